#include "threads.h"

namespace ck {
namespace {

ThreadFunctions functions;

int64_t ask(int32_t (*function)(uint32_t*), int64_t otherwise) {
  uint32_t answer;
  return function != nullptr && function(&answer) == 0 ? answer : otherwise;
}

}  // namespace

void set_thread_functions(const ThreadFunctions& given) { functions = given; }
const ThreadFunctions& thread_functions() { return functions; }
int64_t num_threads() { return ask(functions.num_threads, 1); }
int64_t thread_num() { return ask(functions.thread_num, 0); }

}  // namespace ck
