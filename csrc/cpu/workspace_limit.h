// How much memory the logits may take that wait for a backward sweep; no torch here.
#pragma once

#include <cstdint>

namespace ck {

int64_t workspace_limit();
void set_workspace_limit(int64_t bytes);
// bytes that wait now
int64_t workspace_used();

}  // namespace ck
