// Where a rank fails amid a run's collectives: all ranks leave them with its error, and know what is left of the state.
#include "core/base/error.h"
#include "core/base/log.h"
#include "core/train/agree.h"
#include "core/train/run.h"
#include "core/train/run_together.h"

namespace moe::train {

/// Runs f, a call of all ranks, inside of train::together. f sets reached_ as it goes on.
void Run::on_all(const std::function<void()>& f) {
    if (is_on_all_) return f();                        // the outermost settles it
    struct Flag {
        bool& flag;
        ~Flag() { flag = false; }
    } flag{is_on_all_};
    is_on_all_ = true;
    reached_ = Reached::begin;
    auto reached = [&] { return int64_t(interventions_ && interventions_->is_half_done() ? Reached::changing : reached_); };
    together(mesh_.world, f, reached, [&](int64_t least, int64_t most) {
        if (least == most && Reached(least) != Reached::changing) return;
        is_broken_ = true;
        if (mesh_.world.rank() == 0) log::warn("the run's state is half changed: go back to a checkpoint with run:restore or moe.resume");
    });
}

void Run::check_whole(const std::string& op) const {
    MOE_CHECK(!is_broken_, state, op, mesh_.world.size() > 1 ? "a run whose state is half changed, or changed on some ranks only: one failed amid a change" : "a run whose state is half changed: a change of it failed", "a whole one",
              "run:restore(\"last\"), or with the name of another save, brings one back; moe.resume makes a new run of it");
}

Run::StepBegin Run::step_begin() const { return {loader_->state(), loss_scale_, last_counts_, last_counts_by_domain_, last_dropped_, step_tokens_, skipped_, skipped_in_a_row_}; }

/// Where there will be no run: nothing of a member is used any more, and the groups go in the same order on all ranks.
void Run::free_groups() {
    checkpoints_.reset();
    graph_.reset();
    executor_.reset();
    global_load_.reset();
    interventions_.reset();
    model_.reset();
    mesh_ = {};
}

/// After a step that failed: as it had not begun, where nothing of the state was changed on any rank. Its data comes again.
void Run::go_back(StepBegin begin) {
    model_->store().zero_grads();
    ledger_->clear();
    if (is_broken_ || reached_ == Reached::end) return;
    loss_scale_ = begin.loss_scale;
    last_counts_ = begin.counts;
    last_counts_by_domain_ = begin.counts_by_domain;
    last_dropped_ = begin.dropped;
    step_tokens_ = begin.step_tokens;
    skipped_ = begin.skipped;
    skipped_in_a_row_ = begin.skipped_in_a_row;
    try {
        agree(mesh_.world, [&] { loader_->restore(begin.position); });
    } catch (const Error&) {
        is_broken_ = true;                             // the step's own error is thrown
    }
}

}  // namespace moe::train
