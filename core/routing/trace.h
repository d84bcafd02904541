// What the router did with a set of tokens, kept raw: every table and plot about it is derived from here.
// Letters: N traced tokens, L traced layers, K chosen a token, E experts, D domains, V tokens of the vocabulary.
#pragma once
#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

namespace moe::routing {

/// Ids, domains and chosen experts of the traced tokens, in the order in which they came.
class Trace {
public:
    /// An empty record; `domains` names the labels of begin(). Run::evaluate sets those of the validation data.
    explicit Trace(int64_t num_experts, std::vector<std::string> domains = {}) : num_experts_(num_experts), domains_(std::move(domains)) {}
    void set_domains(std::vector<std::string> domains) { domains_ = std::move(domains); }
    /// Tokens of the next micro-batch, before its layers: ids int64 [T], domain int32 [T] (−1: padding). Padding is kept but
    /// counts nowhere. Throws moe::Error (data) for a label without a name.
    void begin(const at::Tensor& ids_T, const at::Tensor& domain_T);
    /// The decision of one layer (absolute index) for the tokens of the last begin().
    void add(int64_t layer, const at::Tensor& ids_TK);

    int64_t num_tokens() const;
    int64_t num_experts() const { return num_experts_; }
    const std::vector<std::string>& domains() const { return domains_; }
    std::vector<int64_t> layers() const;                    ///< absolute indices of the routed layers, ascending
    at::Tensor ids() const;                                 ///< int64 [N], host
    at::Tensor domain() const;                              ///< int32 [N], host
    at::Tensor experts(int64_t layer) const;                ///< int16 [N, K], host. Throws moe::Error (config) for a layer without a router
    at::Tensor load(int64_t layer) const;                   ///< int64 [D, E]: tokens by domain and expert, host
    /// How often each token id came to an expert: (id, count), most frequent first, at most `top`.
    std::vector<std::pair<int64_t, int64_t>> tokens(int64_t layer, int64_t expert, int64_t top) const;
    /// Positions (0 … N−1) of up to `count` tokens that came to an expert, spread evenly over the trace.
    std::vector<int64_t> examples(int64_t layer, int64_t expert, int64_t count) const;

private:
    const at::Tensor& joined(std::vector<at::Tensor>& parts) const;
    int64_t num_experts_;
    std::vector<std::string> domains_;
    mutable std::vector<at::Tensor> ids_, domain_;
    mutable std::map<int64_t, std::vector<at::Tensor>> experts_;
};

}  // namespace moe::routing
