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
/// rank is that one, or none where it was thrown on all. A collective.
void agree(const dist::Group& world, const std::function<void()>& f);
/// The same with `f` on rank 0 alone.
void on_rank_0(const dist::Group& world, const std::function<void()>& f);

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
