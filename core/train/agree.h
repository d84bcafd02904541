// Errors that one rank meets and all ranks must know.
#pragma once
#include "core/dist/group.h"

#include <functional>
#include <string>

namespace moe::train {

/// `text` of rank `root` on every rank. A collective.
std::string shared_text(std::string text, const dist::Group& world, int root = 0);

/// Every rank runs `f`, in which there must be no collectives. Where it throws on any rank, all ranks throw the error of the first.
/// A collective.
void agree(const dist::Group& world, const std::function<void()>& f);
/// The same with `f` on rank 0 alone.
void on_rank_0(const dist::Group& world, const std::function<void()>& f);

}  // namespace moe::train
