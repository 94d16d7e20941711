--[[
  Set a product's counts to those of Postgres, takes untouched. Run by commit, for lines settled and stock received, adjusted
  or recounted; and by reserve, for a product of which it decided no take.

  Absolute counts with their version, never differences: repeated or late, this can't count anything twice.

  KEYS[1]  stock hash
  KEYS[2]  takes hash, not used
  ARGV[1]  generation of the counts
  ARGV[2]  version
  ARGV[3]  on_hand
  ARGV[4]  reserved

  Returns  1 SET; 0 OLD: the counts here are as new or newer; -1 INVALID: not loaded, or of another generation
--]]
--@include epoch
local SET, OLD = 1, 0

if not current(KEYS[1], ARGV[1]) then
    return INVALID
end
if tonumber(ARGV[2]) <= tonumber(redis.call('HGET', KEYS[1], 'version')) then
    return OLD
end
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'on_hand', ARGV[3], 'reserved', ARGV[4])
return SET
