-- What the command `moelab sweep` and moe.sweep know of each other: jobs and dry stand over what sweep:run is told, quiet leaves its lines out; made lists
-- the sweeps of this session. A dry sweep:run raises dry_end, which ends the file: what comes after it wants results.
return { dry_end = setmetatable({}, { __tostring = function() return "a dry run ends here" end }), jobs = nil, dry = false, quiet = false, made = {} }
