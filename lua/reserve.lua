--[[
  Take units of one product for a list of orders, each if there are enough left, in the order of the list.

  A take is remembered by order id until Postgres has made it a hold (commit.lua) or refused it (release.lua): an order
  that comes again gets the answer that it got before, and nothing is taken twice.

  KEYS[1]  stock hash: epoch, version, on_hand, reserved (as Postgres had them at that version), taken (sum of takes)
  KEYS[2]  takes hash: order id -> units
  ARGV[1]  generation of the counts
  ARGV[2]… order id, units, order id, units, …

  Returns  a list, for each order: 1 taken (now or before), 0 not enough left; nothing is written for a 0
           {-1} the product is not loaded, or what is here is void: load it, then ask again
--]]
--@include epoch
local stock_key, takes_key = KEYS[1], KEYS[2]

if not current(stock_key, ARGV[1]) then
    return { -1 }
end

local counts = redis.call('HMGET', stock_key, 'on_hand', 'reserved', 'taken')
local taken = tonumber(counts[3])
local left = tonumber(counts[1]) - tonumber(counts[2]) - taken
local answers, before = {}, taken

for from = 2, #ARGV, PIECE do
    local to = math.min(from + PIECE - 1, #ARGV)
    local ids, news = {}, {}
    for n = from, to, 2 do
        ids[#ids + 1] = ARGV[n]
    end
    local known = redis.call('HMGET', takes_key, unpack(ids))
    local seen = {}
    for n = 1, #ids do
        local units = tonumber(ARGV[from + 2 * n - 1])
        if known[n] or seen[ids[n]] then
            answers[#answers + 1] = 1
        elseif units <= left then
            left = left - units
            taken = taken + units
            seen[ids[n]] = true
            news[#news + 1] = ids[n]
            news[#news + 1] = ARGV[from + 2 * n - 1]
            answers[#answers + 1] = 1
        else
            answers[#answers + 1] = 0
        end
    end
    if #news > 0 then
        redis.call('HSET', takes_key, unpack(news))
    end
end
if taken ~= before then
    redis.call('HSET', stock_key, 'taken', string.format('%d', taken))
end
return answers
