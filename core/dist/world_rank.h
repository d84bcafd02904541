#pragma once

namespace moe::dist {

/// Rank of this process in world(), −1 until it is open or where it has one rank: what errors carry.
int world_rank();

}  // namespace moe::dist
