--[[
  Give takes back that never reached Postgres: orders that turned out to be somebody else's, or that were decided before.

  KEYS[1]  stock hash
  KEYS[2]  takes hash
  ARGV[1]  generation of the counts
  ARGV[2]… order ids; one without a take is passed over

  Returns  1 done, -1 not loaded or void
--]]
--@include epoch
if not current(KEYS[1], ARGV[1]) then
    return -1
end
local units = drop_takes(KEYS[2], 2)
if units > 0 then
    redis.call('HINCRBY', KEYS[1], 'taken', string.format('%d', -units))
end
return 1
