#include "row_dot.h"

#include "feature_rows.h"

namespace ck {
namespace {

constexpr int64_t kBlock = 64;  // keys

// A thread's memory: for a row, for its keys, and for their gradients.
template <class T>
struct Room {
  explicit Room(int64_t d)
      : row(d), keys(kBlock * d), row_gradient(d, T{0}), gradients(kBlock * d) {}
  Buffer<T> row, keys, row_gradient, gradients;
};

// visit(i, row i of x, a block of its own keys, where they are, their stride, room) for the blocks
// of each row in turn, then done(i, row i of x, room)
template <class T, class Visit, class Done>
void for_rows(const OwnRows<T>& own, const Features<T>& x, const Features<T>& y, Visit visit,
              Done done) {
  const int64_t d = x.d();
  const int64_t most = own.ends == nullptr ? own.keys : y.rows() / x.rows() + 1;
  parallel_for(0, x.rows(), divide_up(kSerialWork, most * d), [&](int64_t begin, int64_t end) {
    Room<T> room(d);
    for (int64_t i = begin; i < end; ++i) {
      int64_t x_stride, y_stride;
      const T* row = x.read({i, i + 1}, room.row.data(), &x_stride);
      const Range all = own.of(i);
      for (int64_t j = all.begin; j < all.end; j += kBlock) {
        const Range block{j, std::min(all.end, j + kBlock)};
        const T* keys = y.read(block, room.keys.data(), &y_stride);
        visit(i, row, block, keys, y_stride, room);
      }
      done(i, row, room);
    }
  });
}

}  // namespace

template <class T>
void row_dot(const OwnRows<T>& own, T* out) {
  const Features<T> x(own.x, own.normalize), y(own.y, own.normalize, false);
  const TileKernels<T>& kernels = tile_kernels<T>();
  for_rows(
      own, x, y,
      [&](int64_t i, const T* row, Range block, const T* keys, int64_t stride, Room<T>& room) {
        kernels.dots(row, keys, stride, own.normalize, x.inverse()[i], block.size(), x.d(),
                     out + block.begin, room.gradients.data(), 1);
      },
      [](int64_t, const T*, Room<T>&) {});
}

template <class T>
void row_dot_backward(const OwnRows<T>& own, const T* grad, void* dx, void* dy) {
  const Features<T> x(own.x, own.normalize), y(own.y, own.normalize);
  const TileKernels<T>& kernels = tile_kernels<T>();
  const int64_t d = x.d();
  const auto place = [d](void* out, Dtype dtype, int64_t row) {
    return static_cast<char*>(out) + row * d * size_of(dtype);
  };
  for_rows(
      own, x, y,
      [&](int64_t i, const T* row, Range block, const T* keys, int64_t stride, Room<T>& room) {
        T* sum = room.row_gradient.data();
        for (int64_t j = block.begin; j < block.end; ++j) {
          T* to_y = room.gradients.data() + (j - block.begin) * d;
          if (grad[j] == 0) {
            std::fill_n(to_y, d, T{0});
            continue;
          }
          const T* key = keys + (j - block.begin) * stride;
          const T weight = grad[j] * x.inverse()[i] * y.inverse()[j];
          if (dx != nullptr) kernels.add_scaled(weight, key, d, sum);
          if (dy != nullptr)
            kernels.project(row, key, y.inverse()[j], own.normalize, weight, d, to_y);
        }
        if (dy != nullptr)
          kernels.write(room.gradients.data(), block.size() * d, own.y.dtype,
                        place(dy, own.y.dtype, block.begin));
      },
      [&](int64_t i, const T* row, Room<T>& room) {
        if (dx == nullptr) return;
        T* sum = room.row_gradient.data();
        kernels.project(sum, row, x.inverse()[i], own.normalize, T{1}, d, sum);
        kernels.write(sum, d, own.x.dtype, place(dx, own.x.dtype, i));
        std::fill_n(sum, d, T{0});
      });
}

template void row_dot(const OwnRows<float>&, float*);
template void row_dot(const OwnRows<double>&, double*);
template void row_dot_backward(const OwnRows<float>&, const float*, void*, void*);
template void row_dot_backward(const OwnRows<double>&, const double*, void*, void*);

}  // namespace ck
