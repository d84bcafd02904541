-- moelab config NAME|FILE [key=value …] [--json]: shows a configuration. --keys: every key with its default and meaning.
return function(words, options, given, assignments)
  if given.keys then
    print(moe.config_keys())
    return
  end
  if not words[1] then
    moe.fail { op = "config", got = "no name", want = "one of " .. table.concat(moe.config_names(), ", ") .. ", or a JSON file", hint = "--keys lists every key" }
  end
  local cfg = moe.config(words[1])
  if #assignments > 0 then cfg = cfg:assign(assignments) end
  cfg:validate { built = false }
  if given.json then
    print(moe.json.encode(cfg:to_table(), { indent = 2 }))
    return
  end
  local p = cfg:params()
  print(cfg:tree())
  print(("\nparameters: %s total, %s active a token (without the embedding); %.4g GFLOPs a token at %d tokens (causal rule)"):format(
    moe.format_count(p.total), moe.format_count(p.active), p.flops_per_token / 1e9, cfg.training.seq_length))
end
