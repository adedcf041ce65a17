// Whether threads have tile registers of AMX in use: a part of torch_parallel_for.
#include <cstdint>

extern "C" void look(int64_t begin, int64_t end, void* found) {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  for (int64_t i = begin; i < end; ++i) static_cast<uint32_t*>(found)[i] = low >> 17 & 3;
}
