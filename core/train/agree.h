// Errors that one rank meets and all ranks must know.
#pragma once
#include "core/base/error.h"
#include "core/dist/group.h"

#include <functional>
#include <string>

namespace moe::train {

/// `text` of rank `root` on every rank. A collective.
std::string shared_text(std::string text, const dist::Group& world, int root = 0);

/// Every rank runs `f`, in which there must be no collectives. Where it throws on any rank, all ranks throw the error of the first; its
/// rank is that one, or none where all threw the same. A collective.
void agree(const dist::Group& world, const std::function<void()>& f);
/// The same with `f` on rank 0 alone.
void on_rank_0(const dist::Group& world, const std::function<void()>& f);
/// The same with collectives of `world` and of groups that were split from it inside `f`. Where an exception ends it on a rank, at whatever place, the other ranks' next call that
/// needs that rank throws; once all have come out of `f` the groups are as before (Group::recover), and all throw the error of the first rank that failed by itself.
/// How far a rank came is `reached`, asked where it fails; `on_failure` gets the least and the most of all ranks, on every rank, before they throw. Inside of another one of the
/// same groups call `f` itself. A collective; of one rank it is `f`, whose exception then keeps its type.
void together(const dist::Group& world, const std::function<void()>& f, const std::function<int64_t()>& reached = {}, const std::function<void(int64_t least, int64_t most)>& on_failure = {});

/// An error as bytes for another rank, and back.
std::string packed_error(const ErrorParts& error);
ErrorParts unpacked_error(const std::string& bytes);

/// Notes that all ranks throw this error now: what this thread throws is then no news for the others.
void note_agreed(const ErrorParts& error);
/// Before something that may throw anew: the same words of one rank alone are news.
void forget_agreed();
/// Whether this is the error that this thread noted last and has not forgotten.
bool is_agreed(const ErrorParts& error);

}  // namespace moe::train
