#include "core/train/agree.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <nlohmann/json.hpp>

#include <new>
#include <tuple>

namespace moe::train {
namespace {
using Json = nlohmann::json;

ErrorParts& agreed_error() {
    thread_local ErrorParts last;
    return last;
}

/// Inside catch: the exception as an error for other ranks.
std::string packed_exception() {
    auto packed = [](ErrorKind kind, const std::string& text) { return packed_error({kind, text.substr(0, text.find('\n')), "", "", "", "", -1, ""}); };
    try {
        throw;
    } catch (const Error& e) {
        return packed_error(e.parts());
    } catch (const c10::Error& e) {
        std::string text = e.what_without_backtrace();
        bool is_memory = text.find("out of memory") != std::string::npos || text.find("can't allocate memory") != std::string::npos;
        return packed(is_memory ? ErrorKind::memory : ErrorKind::internal, text);
    } catch (const std::bad_alloc&) {
        return packed(ErrorKind::memory, "allocation failed: out of memory");
    } catch (const std::exception& e) {
        return packed(ErrorKind::internal, e.what());
    } catch (...) {
        return packed(ErrorKind::internal, "an exception of an unknown type");
    }
}

/// What makes two errors the same: places and tracebacks grow on the way.
auto facts(const ErrorParts& x) { return std::tie(x.kind, x.op, x.got, x.want, x.hint, x.rank); }

/// Throws on all ranks what the first that has a problem brings; nothing where none has. A collective.
void throw_first(const dist::Group& world, const std::string& problem) {
    int64_t first = world.all_reduce(problem.empty() ? int64_t(world.size()) : int64_t(world.rank()), dist::ReduceOp::min);
    if (first == world.size()) return;
    ErrorParts parts = unpacked_error(shared_text(problem, world, int(first)));
    bool same = false;
    if (!problem.empty()) {
        ErrorParts own = unpacked_error(problem);
        same = facts(own) == facts(parts);
    }
    if (world.all_reduce(int64_t(same), dist::ReduceOp::min) == 0) parts.rank = int(first);
    note_agreed(parts);
    throw Error(parts);
}
}  // namespace

std::string packed_error(const ErrorParts& e) {
    Json j = {{"kind", int(e.kind)}, {"op", e.op}, {"got", e.got}, {"want", e.want}, {"hint", e.hint}, {"where", e.where}, {"rank", e.rank}, {"traceback", e.traceback}};
    return j.dump(-1, ' ', false, Json::error_handler_t::replace);
}

ErrorParts unpacked_error(const std::string& bytes) {
    Json j = Json::parse(bytes);
    return {ErrorKind(j.at("kind").get<int>()), j.at("op"), j.at("got"), j.at("want"), j.at("hint"), j.at("where"), j.at("rank"), j.at("traceback")};
}

void note_agreed(const ErrorParts& error) { agreed_error() = error; }
void forget_agreed() { agreed_error() = {}; }

bool is_agreed(const ErrorParts& e) {
    const ErrorParts& last = agreed_error();
    return !last.op.empty() && facts(last) == facts(e);
}

std::string shared_text(std::string text, const dist::Group& world, int root) {
    if (world.size() == 1) return text;
    int64_t size = world.all_reduce(world.rank() == root ? int64_t(text.size()) : int64_t(0));
    at::Tensor bytes = at::zeros({size}, at::kByte);
    if (world.rank() == root) std::copy(text.begin(), text.end(), bytes.data_ptr<uint8_t>());
    if (size > 0) world.broadcast(bytes, root);
    return {reinterpret_cast<const char*>(bytes.data_ptr<uint8_t>()), size_t(size)};
}

void agree(const dist::Group& world, const std::function<void()>& f) {
    if (world.size() == 1) return f();
    dist::BeforeCollectives::pass();                  // nothing of f is done where another rank does not come
    std::string problem;
    try {
        f();
    } catch (...) {
        problem = packed_exception();
    }
    throw_first(world, problem);
}

void together(const dist::Group& world, const std::function<void()>& f, const std::function<int64_t()>& reached, const std::function<void(int64_t, int64_t)>& on_failure) {
    if (world.size() > 1) dist::BeforeCollectives::pass();      // who fails there has begun nothing that the others could recover from with it
    std::string problem;
    int64_t own = 0;
    try {
        f();
        world.barrier();                              // nobody leaves who may yet hear of a failure
        return;
    } catch (...) {
        own = reached ? reached() : 0;
        if (world.size() == 1) {
            if (on_failure) on_failure(own, own);
            throw;
        }
        if (!world.has_failed()) problem = packed_exception();
    }
    world.recover();
    if (on_failure) {
        int64_t least = world.all_reduce(own, dist::ReduceOp::min), most = world.all_reduce(own, dist::ReduceOp::max);
        on_failure(least, most);
    }
    throw_first(world, problem);
    MOE_THROW(internal, "a failure that no rank has met", "", "its error", "");
}

void on_rank_0(const dist::Group& world, const std::function<void()>& f) {
    agree(world, [&] {
        if (world.rank() == 0) f();
    });
}

}  // namespace moe::train
