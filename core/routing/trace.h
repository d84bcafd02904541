// What the router did with a set of tokens, kept raw: every table and plot about it is derived from here.
// Letters: N traced tokens, L traced layers, K chosen a token, E experts, D domains, G groups, T tokens of a micro-batch.
#pragma once
#include "core/dist/group.h"
#include "core/kernels/route/route.h"
#include "core/routing/trace_file.h"

#include <functional>
#include <set>

namespace moe::routing {

struct TraceOptions {
    bool weights = true;                          ///< also weights, margins, entropies
    int64_t memory_bytes = int64_t(256) << 20;    ///< more than this goes to a file
    std::string file;                             ///< where; empty: a nameless temporary file
};

/// One chunk as analyses read it: experts int16.
struct TraceView {
    const TraceChunk& chunk;
    int64_t first;                                ///< number of its first token
    int64_t size() const { return chunk.ids.size(0); }
    const int32_t* ids() const { return chunk.ids.const_data_ptr<int32_t>(); }
    const int16_t* domain() const { return chunk.domain.const_data_ptr<int16_t>(); }
};

/// Ids, domains, positions, chosen experts and weights of the traced tokens, in the order in which they came. Memory is bounded by
/// options.memory_bytes: what is more is in a file, and read from there a chunk at a time.
class Trace {
public:
    /// An empty record; facts.domains names the labels of begin(). Run::evaluate sets those of the validation data.
    explicit Trace(TraceFacts facts, TraceOptions options = {});
    explicit Trace(int64_t num_experts, std::vector<std::string> domains = {});
    /// A file written before. Throws moe::Error (io, data).
    explicit Trace(const std::string& path);
    void set_domains(std::vector<std::string> domains) { facts_.domains = std::move(domains); }
    /// Tokens of the next micro-batch, before its layers: ids int64 [T], domain int32 [T] (−1: padding), sequences of S tokens in turn (0: one). Padding is
    /// kept but counts nowhere. Throws moe::Error (data) for a label without a name, (state) for a trace that was read from a file.
    void begin(const at::Tensor& ids_T, const at::Tensor& domain_T, int64_t S = 0);
    /// The decision of one layer (absolute index) for the tokens of the last begin(); kept, where given, is ids with −1 for what capacity dropped.
    void add(int64_t layer, const at::Tensor& ids_TK, const at::Tensor& kept_TK = {});
    bool wants_details() const { return options_.weights; }
    /// After add(), with the same tokens: what the decision came from. logits and bias (or undefined) as kernels::route took them, scores and weights
    /// as it gave them.
    void add_details(int64_t layer, const at::Tensor& logits_TE, const at::Tensor& bias_E, const kernels::Route& route, const kernels::RouteOptions& options);
    /// After the layers of a micro-batch whose tokens and layers lie on several ranks: every rank gets all of it, the tokens in their order, without what follows the first num_tokens
    /// (all where −1). A collective of the mesh. Every rank has begun with as many tokens; those of tensor-parallel ranks follow one another, then those of data-parallel ranks.
    void gather(const dist::Mesh& mesh, int64_t num_tokens = -1);
    /// Writes what is still in memory and closes options.file, where there is one. Throws moe::Error (io).
    void finish();
    /// Copies everything to a new file. Throws moe::Error (io).
    void save(const std::string& path) const;

    const TraceFacts& facts() const { return facts_; }
    int64_t num_tokens() const;
    int64_t num_experts() const { return facts_.num_experts; }
    const std::vector<std::string>& domains() const { return facts_.domains; }
    std::vector<int64_t> layers() const;                    ///< absolute indices of the routed layers, ascending
    bool has_details() const { return has_details_; }
    bool is_complete() const { return !file_ || is_open_ || file_->is_complete(); }
    int64_t memory_bytes() const { return open_bytes_; }    ///< of the tokens that are not in a file
    /// Throws moe::Error (config) for a layer without a router.
    void check_layer(int64_t layer) const;
    void check_expert(int64_t expert) const;

    /// Calls f for all tokens, a chunk at a time, in their order; f false ends it.
    void each(const std::function<bool(const TraceView&)>& f) const;
    at::Tensor ids() const;                                 ///< int64 [N], host
    at::Tensor domain() const;                              ///< int32 [N], host
    at::Tensor position() const;                            ///< int32 [N], host
    at::Tensor experts(int64_t layer) const;                ///< int16 [N, K], host. Throws moe::Error (config) for a layer without a router
    at::Tensor weights(int64_t layer) const;                ///< float32 [N, K]. Throws moe::Error (state) without weights
    at::Tensor margin(int64_t layer) const;                 ///< float32 [N]
    at::Tensor dropped(int64_t layer) const;                ///< uint8 [N]: how many of the chosen capacity dropped; zeros where nothing could be
    int64_t top_k(int64_t layer) const;                     ///< K of the layer's first tokens
    at::Tensor load(int64_t layer) const;                   ///< int64 [D, E]: tokens by domain and expert, host
    /// How often each token id came to an expert: (id, count), most frequent first, at most `top`.
    std::vector<std::pair<int64_t, int64_t>> tokens(int64_t layer, int64_t expert, int64_t top) const;
    /// Positions (0 … N−1) of up to `count` tokens that came to an expert, spread evenly over the trace.
    std::vector<int64_t> examples(int64_t layer, int64_t expert, int64_t count) const;

private:
    void spill();
    at::Tensor all(const std::function<at::Tensor(const TraceView&)>& part) const;

    TraceFacts facts_;
    TraceOptions options_;
    std::unique_ptr<TraceFile> file_;
    bool is_open_ = true, has_details_ = false;
    int64_t open_bytes_ = 0, file_tokens_ = 0, seq_length_ = 0;        ///< the last: of the last begin()
    std::set<int64_t> layers_;
    mutable std::vector<TraceChunk> open_;                  ///< micro-batches; joined when somebody looks
};

}  // namespace moe::routing
