-- What Redis knows about a product holds only for the server process that learned it and for the generation of counts
-- that Postgres names. The process's run id is written into this text when the script is loaded, and the script cache
-- dies with the process: after a restart no old text can run, whatever the data files brought back.
local RUN_ID = '@RUN_ID@'

local function current(stock_key, generation)
    return redis.call('HGET', stock_key, 'epoch') == RUN_ID .. ':' .. generation
end

-- Calls with long lists are cut into pieces: unpack() has a limit of about 8,000 values.
local PIECE = 1000

-- Forget the takes of the orders ARGV[first], ARGV[first + 1], …; answers how many units they took. An order may stand
-- there twice: its units count once.
local function drop_takes(takes_key, first)
    local units = 0
    for from = first, #ARGV, PIECE do
        local to = math.min(from + PIECE - 1, #ARGV)
        local quantities = redis.call('HMGET', takes_key, unpack(ARGV, from, to))
        local counted = {}
        for n = 1, #quantities do
            local id = ARGV[from + n - 1]
            if quantities[n] and not counted[id] then
                counted[id] = true
                units = units + tonumber(quantities[n])
            end
        end
        redis.call('HDEL', takes_key, unpack(ARGV, from, to))
    end
    return units
end
