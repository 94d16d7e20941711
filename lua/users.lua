--[[
  Postgres has counted the units of users of a limited product: take the counts over.

  Absolute counts, each kept with its version: repeated or late, this can't count anything twice. It runs behind the script
  that forgets the takes which the counts contain: for a moment a user seems to have fewer units, which Postgres sees to.

  KEYS[1]  stock hash
  KEYS[2]  takes hash
  KEYS[3]  users hash: user -> units:version
  ARGV[1]  generation of the counts
  ARGV[2]  version
  ARGV[3]… user, units, user, units, …

  Returns  1 done, -1 not loaded or void
--]]
--@include epoch
if not current(KEYS[1], ARGV[1]) then
    return -1
end
for n = 3, #ARGV, 2 do
    local known = redis.call('HGET', KEYS[3], ARGV[n])
    if not known or tonumber(string.match(known, ':(%d+)$')) < tonumber(ARGV[2]) then
        redis.call('HSET', KEYS[3], ARGV[n], ARGV[n + 1] .. ':' .. ARGV[2])
    end
end
return 1
