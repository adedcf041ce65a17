#include "workspace.h"

#include <cstring>
#include <mutex>
#include <unordered_map>

#include "matrix.h"

namespace ck {
namespace {

struct Workspace {
  std::mutex mutex;
  int64_t limit = int64_t{64} << 20;
  int64_t used = 0;
  // the last memory that came back, for the next one: fresh pages cost as much as some products
  Buffer<char> spare;
  std::unordered_map<const void*, KeptLogits> holders;  // by where the values lie
};

// never destroyed: tensors may outlive it
Workspace& workspace() {
  static Workspace* const one = new Workspace;
  return *one;
}

using Lock = std::lock_guard<std::mutex>;

}  // namespace

int64_t workspace_limit() {
  Workspace& w = workspace();
  const Lock lock(w.mutex);
  return w.limit;
}

void set_workspace_limit(int64_t bytes) {
  Workspace& w = workspace();
  const Lock lock(w.mutex);
  w.limit = bytes;
  w.spare = Buffer<char>();
}

int64_t workspace_used() {
  Workspace& w = workspace();
  const Lock lock(w.mutex);
  return w.used;
}

std::unique_ptr<Keeper> take_logits(int64_t rows, int64_t keys, int64_t block, int64_t size,
                                    bool half) {
  Workspace& w = workspace();
  const Lock lock(w.mutex);
  const int64_t padded = divide_up(rows, kRowPadding) * kRowPadding;
  const int64_t of_block = padded * block * size;
  const int64_t blocks = divide_up(keys, block);
  const int64_t kept = std::min(blocks, (w.limit - w.used) / of_block);
  if (kept <= 0 || (half && kept < blocks)) return nullptr;
  Buffer<char> memory = std::exchange(w.spare, {});
  if (memory.size() < kept * of_block) {
    memory = {};  // gone before more is asked for
    memory = Buffer<char>(kept * of_block);
  }
  w.used += memory.size();
  return std::make_unique<Keeper>(
      KeptLogits{
          .memory = memory.data(),
          .rows = padded,
          .keys = keys,
          .block = block,
          .blocks = blocks,
          .kept = kept,
          .half = half,
          .threads = num_threads(),
      },
      std::move(memory));
}

Keeper::~Keeper() {
  Workspace& w = workspace();
  const Lock lock(w.mutex);
  w.holders.erase(values_.data());
  w.used -= memory_.size();
  if (memory_.size() >= w.spare.size() && memory_.size() + w.used <= w.limit)
    std::swap(w.spare, memory_);
}

void Keeper::stand_for(const void* values, int64_t bytes) {
  values_ = Buffer<char>(bytes);
  std::memcpy(values_.data(), values, bytes);
  Workspace& w = workspace();
  const Lock lock(w.mutex);
  w.holders.emplace(values_.data(), logits_);
}

KeptLogits find_logits(const void* values) {
  Workspace& w = workspace();
  const Lock lock(w.mutex);
  const auto found = w.holders.find(values);
  return found == w.holders.end() ? KeptLogits{} : found->second;
}

}  // namespace ck
