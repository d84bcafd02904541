-- What the command `moelab sweep` and moe.sweep know of each other: jobs and dry stand over what sweep:run is told; made lists the sweeps of this session.
return { jobs = nil, dry = false, made = {} }
