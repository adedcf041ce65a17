#include "row_dot.h"

#include <numeric>

#include "feature_rows.h"

namespace ck {
namespace {

constexpr int64_t kBlock = 64;  // keys

// A thread's memory: for a row and its keys, both of unit length where that is wanted, and for
// their gradients.
template <class T>
struct Room {
  explicit Room(int64_t d)
      : row(d),
        unit(d),
        keys(kBlock * d),
        inverse(kBlock),
        row_gradient(d, T{0}),
        gradients(kBlock * d) {}
  Buffer<T> row, unit, keys, inverse, row_gradient, gradients;
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

// rows (count, D), of unit length if they are normalised, one after the other in out, where they
// may lie, and 1 / norm of each, or 1
template <class T>
void unit_rows(const T* rows, int64_t stride, int64_t count, int64_t d, bool normalize, T* out,
               T* inverse) {
  const TileKernels<T>& kernels = tile_kernels<T>();
  std::fill_n(inverse, count, T{1});
  if (normalize) kernels.norms(rows, stride, count, d, inverse, nullptr);
  for (int64_t i = 0; i < count; ++i) kernels.scaled(inverse[i], rows + i * stride, d, out + i * d);
}

// what a row of unit length lacks of it: more than 0 if its norm was raised
template <class T>
T shortfall(const T* unit, T inverse, int64_t d) {
  if (inverse < kLargestInverse<T>) return 0;
  const T squares = std::inner_product(unit, unit + d, unit, T{0});
  return squares < 1 ? 1 - squares : 0;
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

template <class T>
void row_distance(const OwnRows<T>& own, T* out) {
  const Features<T> x(own.x, own.normalize, false), y(own.y, own.normalize, false);
  const TileKernels<T>& kernels = tile_kernels<T>();
  const int64_t d = x.d();
  for_rows(
      own, x, y,
      [&](int64_t, const T* row, Range block, const T* keys, int64_t stride, Room<T>& room) {
        T *unit_row = room.unit.data(), *unit_keys = room.keys.data();
        T row_inverse;
        unit_rows(row, d, 1, d, own.normalize, unit_row, &row_inverse);
        unit_rows(keys, stride, block.size(), d, own.normalize, unit_keys, room.inverse.data());
        for (int64_t j = 0; j < block.size(); ++j)
          out[block.begin + j] = kernels.distance(unit_row, unit_keys + j * d, d);
      },
      [](int64_t, const T*, Room<T>&) {});
}

// With p and q of unit length, r = p - q and a = <r, p>, so that -<r, q> = |r|^2 - a, the
// derivatives of |r|^2 by the vectors themselves are 2 ((1 - a) r - a q) / |y| and
// -2 (r + (|r|^2 - a) q) / |x|. A norm that was raised is a constant: its vector has no a.
template <class T>
void row_distance_backward(const OwnRows<T>& own, const T* distance, const T* grad, void* dx,
                           void* dy) {
  const Features<T> x(own.x, own.normalize, false), y(own.y, own.normalize, false);
  const TileKernels<T>& kernels = tile_kernels<T>();
  const int64_t d = x.d();
  const auto constant = [&](T inverse) { return !own.normalize || inverse >= kLargestInverse<T>; };
  const auto place = [d](void* out, Dtype dtype, int64_t row) {
    return static_cast<char*>(out) + row * d * size_of(dtype);
  };
  for_rows(
      own, x, y,
      [&](int64_t, const T* row, Range block, const T* keys, int64_t stride, Room<T>& room) {
        T *unit_row = room.unit.data(), *unit_keys = room.keys.data();
        T* sum = room.row_gradient.data();
        T row_inverse;
        unit_rows(row, d, 1, d, own.normalize, unit_row, &row_inverse);
        unit_rows(keys, stride, block.size(), d, own.normalize, unit_keys, room.inverse.data());
        const T row_lacks = shortfall(unit_row, row_inverse, d);
        for (int64_t j = block.begin; j < block.end; ++j) {
          const T inverse = room.inverse[j - block.begin];
          const T* unit = unit_keys + (j - block.begin) * d;
          T* to_y = room.gradients.data() + (j - block.begin) * d;
          const T key_along = (distance[j] + row_lacks - shortfall(unit, inverse, d)) / 2;
          const T along = constant(inverse) ? 0 : key_along;
          const T to_key = 2 * grad[j] * inverse, to_row = -2 * grad[j] * row_inverse;
          kernels.add_difference(unit_row, unit, to_row, to_key * (1 - along), -to_key * along, d,
                                 sum, to_y);
          if (!constant(row_inverse))
            kernels.add_scaled(to_row * (distance[j] - key_along), unit_row, d, sum);
        }
        if (dy != nullptr)
          kernels.write(room.gradients.data(), block.size() * d, own.y.dtype,
                        place(dy, own.y.dtype, block.begin));
      },
      [&](int64_t i, const T*, Room<T>& room) {
        T* sum = room.row_gradient.data();
        if (dx != nullptr) kernels.write(sum, d, own.x.dtype, place(dx, own.x.dtype, i));
        std::fill_n(sum, d, T{0});
      });
}

template void row_dot(const OwnRows<float>&, float*);
template void row_dot(const OwnRows<double>&, double*);
template void row_dot_backward(const OwnRows<float>&, const float*, void*, void*);
template void row_dot_backward(const OwnRows<double>&, const double*, void*, void*);
template void row_distance(const OwnRows<float>&, float*);
template void row_distance(const OwnRows<double>&, double*);
template void row_distance_backward(const OwnRows<float>&, const float*, const float*, void*,
                                    void*);
template void row_distance_backward(const OwnRows<double>&, const double*, const double*, void*,
                                    void*);

}  // namespace ck
