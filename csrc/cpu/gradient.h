// The gradient of one side's features, from the sums over the other side of dL/dz times its
// features.
#pragma once

#include <vector>

#include "feature_rows.h"

namespace ck {

// Sums lie where the gradient goes, unless that is of a half dtype, or holds what they are added
// to: then they are apart until they are whole, which may be so a slab at a time.
template <class T>
class Gradient {
 public:
  // out: all rows, in `dtype`, one after the other; null: only `along` is wanted. When not needed,
  // rows() is null. adds: `out` is there already.
  Gradient(bool needed, void* out, Dtype dtype, bool adds, const Features<T>& x, bool normalize,
           T scale)
      : needed_(needed),
        out_(out),
        dtype_(dtype),
        adds_(adds),
        x_(x),
        normalize_(normalize),
        scale_(scale) {}

  // whether sums are apart from the gradient
  bool apart() const { return needed_ && (adds_ || dtype_ != kDtype<T>); }
  // whether those of all rows take more memory than there is for them
  bool large() const { return apart() && x_.rows() * x_.d() > 2 * kSlabElements; }
  // all rows, or if their sums are apart and may be `cut`, those whose sums take 16 MB
  std::vector<Range> slabs(bool cut) const {
    const int64_t most = kSlabElements / x_.d(), unit = most < kUnit ? kRowPadding : kUnit;
    const int64_t rows = std::max<int64_t>(1, most / unit) * unit;
    std::vector<Range> out;
    for (int64_t i = 0; i < x_.rows(); i = out.back().end)
      out.push_back({i, cut && apart() ? std::min(x_.rows(), i + rows) : x_.rows()});
    return out;
  }
  void start(Range slab) {
    if (!needed_ || (sums_ != nullptr && slab.size() == x_.rows())) return;
    slab_ = slab;
    if (sums_ == nullptr && out_ != nullptr && !apart()) {
      sums_ = static_cast<T*>(out_);
    } else if (sums_ == nullptr) {
      memory_ = Buffer<T>(slab.size() * x_.d());
      sums_ = memory_.data();
    }
    clear(sums_, slab.size() * x_.d());
  }
  // where row 0 would be, of sums of the slab
  T* rows() const { return needed_ ? sums_ - slab_.begin * x_.d() : nullptr; }
  // the sums of a slab to scale (u - [normalize] (x / |x|^2) <x, u>)
  void finish() {
    if (!needed_) return;
    const int64_t d = x_.d();
    Buffer<T> products(slab_.size());
    T* sums = rows();
    const TileKernels<T>& kernels = tile_kernels<T>();
    x_.for_read_blocks(slab_, [&](Range range, const T* features, int64_t stride) {
      for (int64_t i = range.begin; i < range.end; ++i)
        products[i - slab_.begin] =
            kernels.project(sums + i * d, features + (i - range.begin) * stride, x_.inverse()[i],
                            normalize_, scale_, d, sums + i * d);
      if (out_ == nullptr || !apart()) return;
      char* const out = static_cast<char*>(out_) + range.begin * d * size_of(dtype_);
      if (adds_) {
        Buffer<T> there(range.size() * d);
        kernels.read_rows(out, dtype_, d, 1, range.size(), d, there.data());
        for (int64_t i = 0; i < there.size(); ++i) sums[range.begin * d + i] += there[i];
      }
      kernels.write(sums + range.begin * d, range.size() * d, dtype_, out);
    });
    for (int64_t i = 0; i < slab_.size(); ++i) along_ += products[i];
  }
  double along() const { return along_; }  // sum of <x, u>

 private:
  static constexpr int64_t kUnit = 256, kSlabElements = 1 << 22;
  bool needed_;
  void* out_;
  Dtype dtype_;
  bool adds_;
  const Features<T>& x_;
  bool normalize_;
  T scale_;
  Buffer<T> memory_;
  T* sums_ = nullptr;
  Range slab_{0, 0};
  double along_ = 0;
};

}  // namespace ck
