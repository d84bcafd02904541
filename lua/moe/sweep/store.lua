-- A sweep's folder: points/<id>.json is a point with its configuration, and once it has run its result or error.
local store = {}

-- JSON has no nan and no infinity.
local ODD = { ["nan"] = 0 / 0, ["inf"] = math.huge, ["-inf"] = -math.huge }

local function plain(value, path)
  local kind = type(value)
  if kind == "number" then
    if value ~= value then return "nan" end
    return (value == math.huge and "inf") or (value == -math.huge and "-inf") or value
  elseif kind == "table" then
    local copy = {}
    for key, inner in pairs(value) do copy[key] = plain(inner, ("%s.%s"):format(path, tostring(key))) end
    return copy
  elseif kind == "userdata" and value ~= moe.null and moe.help_text(value):find("^tensor") and value:numel() == 1 then
    return plain(value:item(), path)
  elseif kind == "function" or kind == "thread" or (kind == "userdata" and value ~= moe.null) then
    moe.fail { op = "sweep: result: " .. path, got = "a " .. kind, want = "numbers, texts, true, false and tables of them", hint = "tensors by :item() or :to_table()" }
  end
  return value
end

local function odd_back(value)
  if type(value) == "string" then return ODD[value] or value end
  if type(value) ~= "table" then return value end
  for key, inner in pairs(value) do value[key] = odd_back(inner) end
  return value
end

--- The result of fn as plain data; raises (usage) for what cannot be kept.
function store.plain_result(result)
  if type(result) ~= "table" then moe.fail { op = "sweep: fn", got = result == nil and "no result" or type(result), want = "a table of results, such as { loss = 2.5 }" } end
  return plain(result, "result")
end

function store.path(folder, id) return ("%s/points/%s.json"):format(folder, id) end

--- Writes a point; on several ranks only rank 0 does, and the others wait until it is there.
function store.write(folder, sweep_name, point)
  moe.on(0, function(id)
    moe.fs.write(store.path(folder, id), moe.json.encode({
      id = id, sweep = sweep_name, status = point.status, values = point.values, budget = point.budget, round = point.round, result = point.result, error = point.error, secs = point.secs,
      commit = point.commit, device = point.device, finished = point.finished, config = point.config:to_table(),
    }, { indent = 1 }) .. "\n")
  end, point.id)
end

--- The text of a file, nil where there is none: rank 0's look at it on all ranks. Files come to the ranks' machines at different times, and what is missing is decided once.
function store.text(path)
  return moe.on(0, function(name) return moe.fs.exists(name) and moe.fs.read(name) or nil end, path)
end

--- What a point's file says, nil where there is none. A file that cannot be read is an error that names it.
function store.read(folder, id)
  local path = store.path(folder, id)
  local text = store.text(path)
  return text and moe.json.decode(text, path)
end

--- Fills a point with what its file says of a run that has ended. True where there is one.
function store.refresh(folder, point)
  local saved = store.read(folder, point.id)
  if not saved or (saved.status ~= "done" and saved.status ~= "failed") then return false end
  point.status, point.error, point.secs, point.commit, point.device, point.finished = saved.status, saved.error, saved.secs, saved.commit, saved.device, saved.finished
  point.result = saved.result and odd_back(saved.result)
  return true
end

return store
