--[[
  Take one request out of a client's allowance (the generic cell rate algorithm: a leaky bucket of one number). Run by the
  ingress, for each request.

  Redis's own clock counts, so that all ingresses agree; the key expires when the allowance is whole.

  KEYS[1]  the client's key: the moment at which its allowance will be whole again, in microseconds
  ARGV[1]  microseconds after which one request is allowed again
  ARGV[2]  requests that may come at once

  Returns  { 1 ALLOWED or 0 REFUSED, requests left, microseconds until the next one is allowed, microseconds until all are }
--]]
local ALLOWED, REFUSED = 1, 0

local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local whole_at = math.max(tonumber(redis.call('GET', KEYS[1]) or now), now)
local allowed_at = whole_at + interval - interval * burst
if now < allowed_at then
    return {REFUSED, 0, math.ceil(allowed_at - now), math.ceil(whole_at - now)}
end
whole_at = whole_at + interval
redis.call('SET', KEYS[1], string.format('%.0f', whole_at), 'PX', math.ceil((whole_at - now) / 1000))
return {ALLOWED, math.floor((now + interval * burst - whole_at) / interval), 0, math.ceil(whole_at - now)}
