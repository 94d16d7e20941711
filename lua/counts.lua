--[[
  Postgres changed a product's counts (lines settled, stock received or adjusted): take them over.

  Absolute counts with their version, never differences: repeated or late, this can't count anything twice.

  KEYS[1]  stock hash
  ARGV[1]  generation of the counts
  ARGV[2]  version, ARGV[3] on_hand, ARGV[4] reserved

  Returns  1 taken over, 0 the counts here are as new or newer, -1 not loaded or void
--]]
--@include epoch
if not current(KEYS[1], ARGV[1]) then
    return -1
end
if tonumber(ARGV[2]) <= tonumber(redis.call('HGET', KEYS[1], 'version')) then
    return 0
end
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'on_hand', ARGV[3], 'reserved', ARGV[4])
return 1
