// Torch's own threads, without torch: through three C functions that libtorch_cpu exports, whose
// addresses Python looks up. Until they are set, everything runs on the calling thread.
#pragma once

#include <cstdint>
#include <exception>
#include <mutex>

namespace ck {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);

// torch_parallel_for, torch_get_num_threads and torch_get_thread_idx; each gives 0 for success.
struct ThreadFunctions {
  int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, ParallelBody body,
                          void* context) = nullptr;
  int32_t (*num_threads)(uint32_t* out) = nullptr;
  int32_t (*thread_num)(uint32_t* out) = nullptr;
};

void set_thread_functions(const ThreadFunctions& functions);
const ThreadFunctions& thread_functions();

// How many threads there are, and which of them calls.
int64_t num_threads();
int64_t thread_num();

// body(begin, end) for parts of a range of at least `grain` each, on all threads; on the calling
// thread alone inside of another one. The first exception of a part is thrown again at the end.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, Body body) {
  if (begin >= end) return;
  const auto run = thread_functions().parallel_for;
  if (run == nullptr) return body(begin, end);
  struct Context {
    Body& body;
    std::mutex lock;
    std::exception_ptr error;
  } context{body, {}, {}};
  const auto part = [](int64_t first, int64_t last, void* opaque) {
    auto& c = *static_cast<Context*>(opaque);
    try {
      c.body(first, last);
    } catch (...) {
      const std::lock_guard guard(c.lock);
      if (!c.error) c.error = std::current_exception();
    }
  };
  if (run(begin, end, grain, part, &context) != 0) body(begin, end);
  if (context.error) std::rethrow_exception(context.error);
}

}  // namespace ck
