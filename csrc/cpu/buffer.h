// Memory of a call: aligned to a cache line, not initialised, freed with its owner.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <utility>

namespace ck {

// The bytes of all buffers there are, and the most that there were since someone set it.
struct MemoryUse {
  std::atomic<int64_t> now{0}, peak{0};
  void add(int64_t bytes) {
    const int64_t total = now += bytes;
    int64_t most = peak;
    while (most < total && !peak.compare_exchange_weak(most, total)) {
    }
  }
};
inline MemoryUse memory_use;

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new(size * sizeof(T), kAlignment))), size_(size) {
    memory_use.add(size * sizeof(T));
  }
  Buffer(int64_t size, T value) : Buffer(size) { std::fill_n(data_, size, value); }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() {
    memory_use.now -= size_ * sizeof(T);
    ::operator delete(data_, kAlignment);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace ck
