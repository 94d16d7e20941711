--[[
  Set the units of users of a limited product to those that Postgres counted. Run by reserve and commit.

  Absolute counts, each kept with its version: repeated or late, this can't count anything twice. It runs after the script
  that forgets the takes which the counts contain: for a moment a user seems to have fewer units; Postgres keeps the limit.

  KEYS[1]  stock hash
  KEYS[2]  takes hash, not used
  KEYS[3]  users hash: user -> units:version
  KEYS[4]  claims hash, not used
  ARGV[1]  generation of the counts
  ARGV[2]  version
  ARGV[3]… user, units, user, units, …

  Returns  1 DONE; -1 INVALID: not loaded, or of another generation
--]]
--@include epoch
local DONE = 1

if not current(KEYS[1], ARGV[1]) then
    return INVALID
end
for n = 3, #ARGV, 2 do
    local known = redis.call('HGET', KEYS[3], ARGV[n])
    if not known or tonumber(string.match(known, ':(%d+)$')) < tonumber(ARGV[2]) then
        redis.call('HSET', KEYS[3], ARGV[n], ARGV[n + 1] .. ':' .. ARGV[2])
    end
end
return DONE
