#include "top_k.h"

#include <cmath>

#include "schedule.h"

namespace ck {
namespace {

template <class T>
struct Candidate {
  T value;
  int64_t id;
};

// A total order, so that what comes first does not depend on who looked when.
template <class T>
bool before(const Candidate<T>& a, const Candidate<T>& b) {
  if (a.value > b.value) return true;
  if (a.value < b.value) return false;
  const bool a_nan = std::isnan(a.value), b_nan = std::isnan(b.value);
  return a_nan == b_nan ? a.id < b.id : a_nan;
}

// Candidates of each row of a block, of which the first k are kept whenever their room is full:
// a candidate costs the same for any k.
template <class T>
class Lists {
 public:
  Lists(int64_t rows, int64_t k, int64_t keys)
      : k_(k),
        room_(std::min(k + std::max(k, kLeast), keys)),
        sizes_(rows),
        candidates_(rows * room_) {}

  void start() { std::fill_n(sizes_.data(), sizes_.size(), int64_t{0}); }

  // `floor` of the row is raised to what a candidate must be above
  void add(int64_t row, const Candidate<T>& candidate, T& floor) {
    int64_t& size = sizes_[row];
    Candidate<T>* const list = begin(row);
    if (size == room_) {
      std::nth_element(list, list + k_ - 1, list + size, before<T>);
      size = k_;
      const T last = list[k_ - 1].value;
      floor = std::isnan(last) ? std::numeric_limits<T>::infinity() : last;
      // it was found before the floor rose
      if (!before(candidate, list[k_ - 1])) return;
    }
    list[size++] = candidate;
  }

  // the first k of a row, in their order
  Range finish(int64_t row) {
    Candidate<T>* const list = begin(row);
    const int64_t count = std::min(sizes_[row], k_);
    std::partial_sort(list, list + count, list + sizes_[row], before<T>);
    return {row * room_, row * room_ + count};
  }
  const Candidate<T>& operator[](int64_t at) const { return candidates_[at]; }

 private:
  static constexpr int64_t kLeast = 16;
  Candidate<T>* begin(int64_t row) { return candidates_.data() + row * room_; }

  int64_t k_, room_;
  Buffer<int64_t> sizes_;
  Buffer<Candidate<T>> candidates_;
};

template <class T>
class TopKSweep {
 public:
  TopKSweep(const PairArguments<T>& arguments, const TopKOptions<T>& options)
      : o_(options), p_(arguments), parts_(key_parts(p_)) {
    if (parts_.size() == 1) return;
    const int64_t entries = p_.x.rows() * options.k * static_cast<int64_t>(parts_.size());
    part_values_ = Buffer<T>(entries);
    part_ids_ = Buffer<int64_t>(entries);
  }

  void run() {
    Workers<T> workers(p_);
    std::vector<std::unique_ptr<Room>> rooms(num_threads());
    for_row_blocks(p_, workers, {0, p_.x.rows()}, parts_,
                   [&](Worker<T>& worker, Range rows, int64_t part) {
                     auto& room = rooms[thread_num()];
                     if (!room) room = std::make_unique<Room>(p_, o_.k);
                     worker.take_rows(rows);
                     sweep(worker, *room, parts_[part]);
                     put(rows, room->lists, part);
                   });
    if (parts_.size() > 1) merge();
  }

 private:
  // so few that what they find soon counts for the next
  static constexpr int kKeys = 16;
  enum Lanes { kFloorLanes, kCeilingLanes };

  struct Room {
    Room(const Problem<T>& problem, int64_t k)
        : lists(problem.block_rows, k, problem.keys), found(problem.block_rows * kKeys) {}
    Lists<T> lists;
    Buffer<Found<T>> found;
  };

  void sweep(Worker<T>& worker, Room& room, Range keys) {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    const int64_t count = worker.rows().size();
    T* const floor = worker.lane_buffer(kFloorLanes);
    if (o_.floor != nullptr) {
      worker.lanes(kFloorLanes, o_.floor, infinity);
    } else {
      std::fill_n(floor, count, -infinity);
      std::fill(floor + count, floor + worker.padded_rows(), infinity);
    }
    const T* ceiling =
        o_.ceiling == nullptr ? nullptr : worker.lanes(kCeilingLanes, o_.ceiling, infinity);
    room.lists.start();
    for_blocks(keys, p_.block_keys, [&](Range block) {
      if (!worker.make_tile(block)) return;
      for_blocks({0, block.size()}, kKeys, [&](Range few) {
        const int found =
            p_.kernels.find(worker.tile(), static_cast<int>(few.begin), static_cast<int>(few.end),
                            floor, ceiling, room.found.data());
        for (int f = 0; f < found; ++f) {
          const Found<T>& one = room.found[f];
          if (one.row < count)
            room.lists.add(one.row, {one.value, block.begin + one.key}, floor[one.row]);
        }
      });
    });
  }

  void put(Range rows, Lists<T>& lists, int64_t part) {
    const bool whole = parts_.size() == 1;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t to = whole ? row * o_.k : (part * p_.x.rows() + row) * o_.k;
      write(lists, lists.finish(row - rows.begin), (whole ? o_.values : part_values_.data()) + to,
            (whole ? o_.ids : part_ids_.data()) + to);
    }
  }

  template <class List>
  void write(const List& list, Range which, T* values, int64_t* ids) {
    for (int64_t at = which.begin; at < which.end; ++at) {
      *values++ = list[at].value;
      *ids++ = list[at].id;
    }
    std::fill_n(values, o_.k - which.size(), -std::numeric_limits<T>::infinity());
    std::fill_n(ids, o_.k - which.size(), int64_t{-1});
  }

  void merge() {
    std::vector<Candidate<T>> all;
    for (int64_t row = 0; row < p_.x.rows(); ++row) {
      all.clear();
      for (int64_t part = 0; part < static_cast<int64_t>(parts_.size()); ++part) {
        const int64_t from = (part * p_.x.rows() + row) * o_.k;
        for (int64_t i = from; i < from + o_.k && part_ids_[i] >= 0; ++i)
          all.push_back({part_values_[i], part_ids_[i]});
      }
      const int64_t count = std::min(o_.k, static_cast<int64_t>(all.size()));
      std::partial_sort(all.begin(), all.begin() + count, all.end(), before<T>);
      write(all, {0, count}, o_.values + row * o_.k, o_.ids + row * o_.k);
    }
  }

  const TopKOptions<T> o_;
  const Problem<T> p_;
  const std::vector<Range> parts_;
  Buffer<T> part_values_;
  Buffer<int64_t> part_ids_;
};

}  // namespace

template <class T>
void top_k(const PairArguments<T>& arguments, const TopKOptions<T>& options) {
  TopKSweep<T>(arguments, options).run();
}

template void top_k(const PairArguments<float>&, const TopKOptions<float>&);
template void top_k(const PairArguments<double>&, const TopKOptions<double>&);

}  // namespace ck
