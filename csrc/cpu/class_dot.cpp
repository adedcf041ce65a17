#include "class_dot.h"

#include <stdexcept>

#include "feature_rows.h"

namespace ck {
namespace {

// The rows in the order of their classes, and where each class begins and ends.
struct Classes {
  explicit Classes(const ClassRows& rows) : order(rows.x.rows, 0) {
    const int64_t n = rows.x.rows;
    Buffer<int64_t> ends(n);
    for (int64_t i = 0; i < n; ++i) ends[i] = i;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t place = rows.places[i];
      if (place < 0 || place >= n || ends[place] >= n)
        throw std::out_of_range("place must have numbers of rows that come before");
      order[ends[place]++] = i;
    }
    for (int64_t i = 0; i < n; ++i)
      if (ends[i] > i) ranges.push_back({i, ends[i]});
  }

  Buffer<int64_t> order;
  std::vector<Range> ranges;
};

template <class T>
class ClassSweep {
 public:
  explicit ClassSweep(const ClassRows& rows)
      : classes_(rows), x_(rows.x, rows.normalize, true, {}, true), normalize_(rows.normalize) {}

  void values(T* out) const {
    for_classes([&](Range members, Room& room) {
      add_members(members, nullptr, room.sum, room);
      for (int64_t m = members.begin; m < members.end; ++m) {
        const int64_t i = classes_.order[m];
        const T* z = unit(i, room);
        for (int64_t k = 0; k < x_.d(); ++k) room.others[k] = room.sum[k] - z[k];
        T inverse;
        kernels_.dots(z, room.others.data(), x_.d(), false, T{1}, 1, x_.d(), out + i, &inverse, 1);
      }
    });
  }

  // of sum_i grad_i <z_i, others of i>: grad_i times the others, and the others times their grad
  void gradients(const T* grad, Dtype dtype, void* dx, bool add) const {
    const int64_t d = x_.d();
    for_classes([&](Range members, Room& room) {
      add_members(members, nullptr, room.sum, room);
      add_members(members, grad, room.weighted, room);
      for (int64_t m = members.begin; m < members.end; ++m) {
        const int64_t i = classes_.order[m];
        const T* z = unit(i, room);
        T* made = room.others.data();
        for (int64_t k = 0; k < d; ++k)
          made[k] = grad[i] * (room.sum[k] - z[k]) + (room.weighted[k] - grad[i] * z[k]);
        const T inverse = x_.inverse()[i];
        kernels_.project(made, row(i, room), inverse, normalize_, inverse, d, made);
        char* const out = static_cast<char*>(dx) + i * d * size_of(dtype);
        if (add) {
          kernels_.read_rows(out, dtype, d, 1, 1, d, room.unit.data());
          kernels_.add_scaled(T{1}, room.unit.data(), d, made);
        }
        kernels_.write(made, d, dtype, out);
      }
    });
  }

 private:
  struct Room {
    explicit Room(int64_t d) : row(d), unit(d), sum(d), weighted(d), others(d) {}
    Buffer<T> row, unit, sum, weighted, others;
  };

  template <class Visit>
  void for_classes(Visit visit) const {
    const int64_t count = static_cast<int64_t>(classes_.ranges.size());
    parallel_for(0, count, divide_up(kSerialWork, x_.rows() / count * x_.d()),
                 [&](int64_t begin, int64_t end) {
                   Room room(x_.d());
                   for (int64_t c = begin; c < end; ++c) visit(classes_.ranges[c], room);
                 });
  }
  const T* row(int64_t i, Room& room) const {
    int64_t stride;
    return x_.read({i, i + 1}, room.row.data(), &stride);
  }
  const T* unit(int64_t i, Room& room) const {
    kernels_.scaled(x_.inverse()[i], row(i, room), x_.d(), room.unit.data());
    return room.unit.data();
  }
  // sum = that of the members, each times its weight, null: 1
  void add_members(Range members, const T* weights, Buffer<T>& sum, Room& room) const {
    std::fill_n(sum.data(), sum.size(), T{0});
    for (int64_t m = members.begin; m < members.end; ++m) {
      const int64_t i = classes_.order[m];
      kernels_.add_scaled(weights == nullptr ? T{1} : weights[i], unit(i, room), x_.d(),
                          sum.data());
    }
  }

  const Classes classes_;
  const Features<T> x_;
  const bool normalize_;
  const TileKernels<T>& kernels_ = tile_kernels<T>();
};

}  // namespace

template <class T>
void class_dot(const ClassRows& rows, T* out) {
  ClassSweep<T>(rows).values(out);
}

template <class T>
void class_dot_backward(const ClassRows& rows, const T* grad, void* dx, bool add) {
  ClassSweep<T>(rows).gradients(grad, rows.x.dtype, dx, add);
}

template void class_dot(const ClassRows&, float*);
template void class_dot(const ClassRows&, double*);
template void class_dot_backward(const ClassRows&, const float*, void*, bool);
template void class_dot_backward(const ClassRows&, const double*, void*, bool);

}  // namespace ck
