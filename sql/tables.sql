-- The durable truth: stock and the ledger of its movements, orders, holds of other homes' orders, and how far each partition
-- has read.  Every row belongs to one partition, and only the worker that claims that partition's lanes writes it.
--
-- No foreign keys between the hot tables: the stage functions write parent and child in one transaction, a check of a reference
-- costs as much as the row, and invariants.sql looks for orphans.

CREATE TYPE order_status AS ENUM ('CREATED', 'RESERVED', 'PAID', 'CONFIRMED', 'CANCELLED');
CREATE TYPE cancel_reason AS ENUM
    ('unknown_product', 'insufficient_stock', 'user_limit', 'payment_declined', 'expired', 'cancelled_by_user');
CREATE TYPE movement AS ENUM
    ('initial', 'receive', 'adjust', 'hold', 'commit', 'release', 'return', 'carried');
CREATE TYPE lane AS ENUM ('intake', 'settle');

-- NULL: nobody was asked for money yet, or the answer is not known.  *_DUE: the provider has to be asked until it answers.
-- REFUSED: it refused to give the money back for good, and people have to.
CREATE TYPE payment AS ENUM ('SUCCESS', 'FAILED', 'REFUND_DUE', 'REFUNDED', 'VOID_DUE', 'VOIDED', 'REFUSED');


-- Which pipeline's database this is: one row.  A worker of another pipeline is refused.
CREATE TABLE pipeline (
    app_id       text NOT NULL,
    topic_prefix text NOT NULL,
    partitions   int  NOT NULL CONSTRAINT pipeline_partitions_positive CHECK (partitions > 0),
    created_at   timestamptz NOT NULL DEFAULT now(),
    system       text,                          -- the server that this was written on, and its timeline: another one means
    timeline     text,                          -- that this was restored, or a standby promoted
    set_backs    int NOT NULL DEFAULT 0,        -- how often somebody found that Postgres was set back,
    folded       int NOT NULL DEFAULT 0,        -- and how many of these were made good from the topics
    id           uuid NOT NULL DEFAULT gen_random_uuid(),  -- names it in Redis
    redis        text,                          -- the Redis of its gate: process and replication history,
    gates        int NOT NULL DEFAULT 0,        -- and how often that was another one than before
    one          boolean PRIMARY KEY DEFAULT true CONSTRAINT pipeline_once CHECK (one)
);

-- The fence.  Each transaction of a worker moves the sequence of the lanes that it writes for, under the claim that it took at
-- its assignment; with another claim or sequence it writes nothing.  Locked first, in the order of the primary key.
CREATE TABLE lanes (
    partition int    NOT NULL,
    lane      lane   NOT NULL,
    claim     bigint NOT NULL DEFAULT 0,        -- grows when a worker takes the partition over
    sequence  bigint NOT NULL DEFAULT 0,        -- transactions so far
    attempt   uuid,                             -- names the last one: a worker whose answer was lost finds that it committed
    at        timestamptz,                      -- when it began
    CONSTRAINT lanes_once PRIMARY KEY (partition, lane)
) WITH (fillfactor = 20);

-- What of a topic's partition has been read: all before next_offset.  The last record's time and digest tell a log that was
-- truncated or made again from the one that was read.  A mark never goes back within one log.
CREATE TABLE marks (
    partition    int    NOT NULL,
    topic        text   NOT NULL,
    next_offset  bigint NOT NULL,
    acknowledged bigint NOT NULL DEFAULT 0,     -- all before it is acknowledged: where to read without a group offset
    stamp        bigint NOT NULL,               -- of the last record before it: milliseconds since the epoch
    digest       bigint NOT NULL,               -- and a hash of its bytes; -1: that record is not known
    floor        bigint NOT NULL DEFAULT 0,     -- where the log ended when Postgres was last found set back
    set_back     int    NOT NULL DEFAULT 0,     -- the group's offset was put right after so many set-backs
    CONSTRAINT marks_once PRIMARY KEY (partition, topic)
) WITH (fillfactor = 20);


-- One row a product, updated in place (HOT): nothing but the primary key is indexed.
CREATE TABLE stock (
    product_id     text PRIMARY KEY,
    partition      int    NOT NULL,
    name           text   NOT NULL,
    price_cents    bigint NOT NULL CONSTRAINT stock_price_bounded CHECK (price_cents BETWEEN 0 AND 1000000000000),
    on_hand        bigint NOT NULL,             -- units in the house, held ones included
    reserved       bigint NOT NULL DEFAULT 0,   -- of these, held for orders
    initial        bigint NOT NULL,
    received       bigint NOT NULL DEFAULT 0,
    adjusted       bigint NOT NULL DEFAULT 0,
    owed           bigint NOT NULL DEFAULT 0,   -- sold beyond what there is, as a set-back left it: counted as adjusted, until
                                                -- units that come in or come back are put against them
    sold           bigint NOT NULL DEFAULT 0,
    limit_per_user bigint CONSTRAINT stock_limit_positive CHECK (limit_per_user > 0),
    limited_since  timestamptz,                 -- when this limit began to stand
    sold_before    bigint NOT NULL DEFAULT 0,   -- sold when the price last changed, and what that brought: what is sold
    revenue_before numeric NOT NULL DEFAULT 0,  -- since then has today's price
    retired        boolean NOT NULL DEFAULT false,  -- for orders it is unknown; what they hold and bought stays
    version        bigint NOT NULL DEFAULT 1,   -- grows with each change; Redis takes no older counts than it has
    generation     bigint NOT NULL DEFAULT 1,   -- grows when Redis missed a change; invalidates what Redis has
    created_at     timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT stock_on_hand_not_negative  CHECK (on_hand >= 0),
    CONSTRAINT stock_reserved_not_negative CHECK (reserved >= 0),
    CONSTRAINT stock_not_oversold          CHECK (reserved <= on_hand),
    CONSTRAINT stock_sold_not_negative     CHECK (sold >= 0),
    CONSTRAINT stock_owed_not_negative     CHECK (owed >= 0),
    CONSTRAINT stock_adds_up               CHECK (initial + received + adjusted = on_hand + sold),
    CONSTRAINT stock_limited_since         CHECK ((limit_per_user IS NULL) = (limited_since IS NULL))
) WITH (fillfactor = 50);

-- Append-only: one row for all that a transaction moved of a product in one way, with the orders that it was moved for.
-- A transaction is named by the product's partition, its lane and its sequence.
CREATE TABLE ledger (
    partition  int      NOT NULL,
    lane       lane     NOT NULL,
    sequence   bigint   NOT NULL,
    product_id text     NOT NULL,
    movement   movement NOT NULL,
    quantity   bigint   NOT NULL,               -- units; negative only downwards by an adjustment, or to counter an entry
    order_ids  uuid[],                          -- of hold, commit, release, return
    quantities int[],                           -- of these orders, in the same order
    command_id uuid,                            -- of initial, receive, adjust
    reason     text,
    actor      text,                            -- who gave the command, as its record says
    at         timestamptz NOT NULL,
    CONSTRAINT ledger_sign CHECK (quantity > 0 OR movement = 'adjust' OR (movement = 'initial' AND quantity = 0)
                                  OR (reason LIKE 'reconcile: counters %') IS TRUE),
    CONSTRAINT ledger_orders CHECK ((movement IN ('hold', 'commit', 'release', 'return')) = (order_ids IS NOT NULL))
);
CREATE INDEX ledger_by_product ON ledger (product_id, at);
CREATE INDEX ledger_of_commands ON ledger (product_id, at, command_id) WHERE command_id IS NOT NULL;
CREATE INDEX ledger_by_time ON ledger USING brin (at);

-- Who has how many units of a product with a limit: held or sold.  Of the product's partition.
CREATE TABLE user_units (
    product_id text   NOT NULL,
    user_id    text   NOT NULL,
    units      bigint NOT NULL CONSTRAINT user_units_not_negative CHECK (units >= 0),
    CONSTRAINT user_units_once PRIMARY KEY (product_id, user_id)
) WITH (fillfactor = 50);


-- One row an order, of its home: the partition of `orders` in which its record stands.  Updated in place (HOT): no index has a
-- column that changes.  The lines stand in arrays of equal length; people read the view order_lines.
--
-- States of a line: a asked (of another owner) · h held · x refused · g commit sent · c committed · l release sent · r released ·
-- b return sent · n returned.  Lines at home never are a, g, l or b.
CREATE TABLE orders (
    order_id        uuid PRIMARY KEY,
    home            int    NOT NULL,
    source_offset   bigint NOT NULL,
    status          order_status NOT NULL,
    reason          cancel_reason,
    user_id         text   NOT NULL,
    payment_method  text   NOT NULL,
    idempotency_key text,
    placed_at       timestamptz,
    product_ids     text[]   NOT NULL,
    quantities      int[]    NOT NULL,
    prices          bigint[] NOT NULL,          -- in cents, as in the catalogue when the line was held; null elements before
    states          "char"[] NOT NULL,
    reasons         cancel_reason[],            -- of refused lines; null: no line was refused
    owners          int[],                      -- partition of each line's product; null: all at home
    total_cents     bigint,
    payment         payment,
    charge_id       text,
    created_at      timestamptz NOT NULL,
    reserved_at     timestamptz,
    paid_at         timestamptz,
    confirmed_at    timestamptz,
    cancelled_at    timestamptz,
    refunded_at     timestamptz,
    command_partition int,                      -- of the record on `order-commands` that ended it
    command_offset    bigint,
    met_again_at    timestamptz,                -- when another record than its own last brought its id; to the half hour
    CONSTRAINT orders_have_lines CHECK (cardinality(product_ids) > 0 AND cardinality(product_ids) = ALL (ARRAY[
        cardinality(quantities), cardinality(prices), cardinality(states), cardinality(reasons), cardinality(owners)])),
    CONSTRAINT orders_reserved_total CHECK (reserved_at IS NULL OR total_cents IS NOT NULL),
    CONSTRAINT orders_status_times CHECK (CASE status
        WHEN 'CREATED'   THEN reserved_at IS NULL AND paid_at IS NULL AND confirmed_at IS NULL AND cancelled_at IS NULL
        WHEN 'RESERVED'  THEN reserved_at IS NOT NULL AND paid_at IS NULL AND confirmed_at IS NULL AND cancelled_at IS NULL
        WHEN 'PAID'      THEN paid_at IS NOT NULL AND confirmed_at IS NULL AND cancelled_at IS NULL
        WHEN 'CONFIRMED' THEN paid_at IS NOT NULL AND confirmed_at IS NOT NULL AND cancelled_at IS NULL
        WHEN 'CANCELLED' THEN cancelled_at IS NOT NULL END),
    CONSTRAINT orders_cancelled_reason CHECK ((status = 'CANCELLED') = (reason IS NOT NULL)),
    CONSTRAINT orders_paid_for CHECK (status NOT IN ('PAID', 'CONFIRMED') OR payment IS NOT DISTINCT FROM 'SUCCESS')
) WITH (fillfactor = 43);  -- a settled row is a quarter longer than a held one: at 50 a fifth of them left their page
CREATE INDEX orders_created_at ON orders (created_at);
CREATE INDEX orders_of_user ON orders (hashtextextended(user_id, 0), created_at);  -- half of what the text costs hold

-- Orders of a home that are not over after a moment, and what is due at the provider: the home takes them up from here, also
-- after a crash.
CREATE TABLE waiting (
    home     int  NOT NULL,
    order_id uuid NOT NULL,
    since    timestamptz NOT NULL,
    reply_to text,
    CONSTRAINT waiting_once PRIMARY KEY (home, order_id)
) WITH (fillfactor = 70);

-- Cancels that came before their order, kept by the partition that read them.
CREATE TABLE kept_commands (
    partition int    NOT NULL,
    order_id  uuid   NOT NULL,
    "offset"  bigint NOT NULL,
    kept_at   timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT kept_commands_once PRIMARY KEY (partition, order_id)
);
CREATE INDEX kept_commands_by_order ON kept_commands (order_id);

-- Records on `orders` that no stage can read, and that name the id of an order which is not there: of the partition that read
-- them.  One that comes later under the id stands in `orders`, and this counts no more.
CREATE TABLE rejections (
    order_id    uuid   NOT NULL,
    partition   int    NOT NULL,
    "offset"    bigint NOT NULL,
    reason      text   NOT NULL,
    detail      text   NOT NULL,
    rejected_at timestamptz NOT NULL,
    CONSTRAINT rejections_once PRIMARY KEY (order_id, partition, "offset")
);

-- Ids of orders that ended long ago and were removed.  The payment provider knows them as keys for ever: an order that came
-- under one again would be sold on the old one's charge, or have it given back.
CREATE TABLE removed_orders (
    order_id   uuid PRIMARY KEY,
    removed_at timestamptz NOT NULL DEFAULT now()
);

-- Lines of orders of other homes, of the partition that owns the product.  They move one way only: h held, x refused; then
-- c committed, r released; n returned.  A release that came before its line is a row that was never held.
CREATE TABLE holds (
    partition  int    NOT NULL,
    order_id   uuid   NOT NULL,
    product_id text   NOT NULL,
    home       int    NOT NULL,
    user_id    text   NOT NULL,
    quantity   int    NOT NULL,
    price      bigint,
    state      "char" NOT NULL,
    reason     cancel_reason,
    held_at    timestamptz NOT NULL,
    ended_at   timestamptz,                     -- when it was committed, released, or refused
    returned_at timestamptz,                    -- when it was returned after it was committed
    CONSTRAINT holds_once PRIMARY KEY (order_id, product_id)
) WITH (fillfactor = 70);
CREATE INDEX holds_by_partition ON holds (partition, held_at) WHERE state = 'h';

-- The last decision on each stock command.  A repeat is answered from here; one under the same id with other content is refused.
CREATE TABLE stock_commands (
    command_id uuid PRIMARY KEY,
    partition  int    NOT NULL,
    product_id text   NOT NULL,
    command    text   NOT NULL
        CONSTRAINT stock_commands_kind CHECK (command IN ('receive', 'adjust', 'set', 'product', 'limit')),
    quantity   bigint NOT NULL,                 -- of `limit` the limit, 0: none
    reason     text   NOT NULL,
    actor      text,                            -- who gave it, as its record says
    outcome    text   NOT NULL
        CONSTRAINT stock_commands_outcome CHECK (outcome IN ('applied', 'unknown_product', 'insufficient_stock', 'too_many_units',
                                                           'product_changed')),
    change     bigint NOT NULL,                 -- what it added or removed: of `set`, the difference when it was decided; of
                                                -- `product`, 1 where it made it
    decided_at timestamptz NOT NULL,
    name        text,                           -- of `product`; null: as it was
    price_cents bigint,
    more        text,                           -- of `product`, what else it says: limit_per_user, retired, was (JSON)
    "offset"    bigint                          -- of its record on `stock-commands`; read again, it is not decided anew
);


-- Money that the provider does not give back: one row an order whose payment became REFUSED, written by its home's transaction.
-- Open until people close it, or the provider gives it back after all. What people do is written by their command.
CREATE TABLE refusals (
    order_id   uuid PRIMARY KEY,
    refused_at timestamptz NOT NULL,            -- last
    retried_at timestamptz,                     -- when people last had the provider asked again
    closed_at  timestamptz,
    why        text,                            -- it was closed, as the operator said it
    CONSTRAINT refusals_closed_why CHECK ((closed_at IS NULL) = (why IS NULL))
);


-- What was done about dead letters.  The letters stay on their topic as they are; one that has no row here is open.
CREATE TYPE letter_action AS ENUM ('retry', 'drop');

-- One narrow row a letter that somebody dealt with.  A retry is noted before its record is produced and done_at after: a row
-- without done_at is a retry under way, or one that a crash left, which running it again completes.
CREATE TABLE letter_actions (
    letter_partition int           NOT NULL,    -- where on the topic `dead-letters` the letter stands
    letter_offset    bigint        NOT NULL,
    letter_at        timestamptz   NOT NULL,    -- when it was written: offsets of a topic made anew count from 0 again
    action           letter_action NOT NULL,
    why              text,                      -- of a drop: as the operator said it
    value            bytea,                     -- of a retry: what was sent instead of the letter's own bytes
    begun_at         timestamptz   NOT NULL DEFAULT now(),
    done_at          timestamptz,
    CONSTRAINT letter_actions_once     PRIMARY KEY (letter_partition, letter_offset, letter_at),
    CONSTRAINT letter_actions_drop_why CHECK ((action = 'drop') = (why IS NOT NULL)),
    CONSTRAINT letter_actions_drop     CHECK (action = 'retry' OR (done_at IS NOT NULL AND value IS NULL))
);

-- What each run of `orderstream reconcile` found.  Workers and ingresses tell Prometheus of the last one: the command itself
-- has ended before anybody could scrape it.
CREATE TABLE reconcile_runs (
    at             timestamptz      NOT NULL DEFAULT now() CONSTRAINT reconcile_runs_once PRIMARY KEY,
    resumed        boolean          NOT NULL,   -- it went on from a checkpoint
    records        bigint           NOT NULL,   -- read, in so many seconds
    seconds        double precision NOT NULL,
    orders         bigint           NOT NULL,   -- compared
    products       bigint           NOT NULL,
    open_orders    bigint           NOT NULL,
    drift          jsonb            NOT NULL,   -- kind of difference to how many were found; kinds without one left out
    unrepaired     jsonb            NOT NULL    -- the same of those that stand after --repair --yes
);


-- For people: what each product has sold, and what that brought.  A unit counts at the catalogue's price when it was sold; one
-- that comes back takes with it what the last ones brought.  So nothing has to be written for it but at a change of the price.
CREATE VIEW product_sales AS
SELECT product_id, name, price_cents, on_hand - reserved AS available, reserved, sold, limit_per_user,
       CASE WHEN sold >= sold_before THEN revenue_before + (sold - sold_before)::numeric * price_cents
            ELSE div(revenue_before::numeric * sold, sold_before) END AS revenue_cents
FROM stock;

-- For people: the lines of orders, a row each.  A line that its owner has not settled yet is as its owner has it.
CREATE VIEW order_lines AS
SELECT o.order_id, l.n AS line, l.product_id, l.quantity, l.price AS unit_price_cents,
       CASE l.state WHEN 'a' THEN 'pending' WHEN 'h' THEN 'held' WHEN 'g' THEN 'held' WHEN 'l' THEN 'held'
                    WHEN 'x' THEN 'refused' WHEN 'c' THEN 'committed' WHEN 'b' THEN 'committed'
                    WHEN 'r' THEN 'released' WHEN 'n' THEN 'returned' END AS state,
       l.reason::text AS reason, coalesce(l.owner, o.home) AS owner
FROM orders o CROSS JOIN LATERAL
     unnest(o.product_ids, o.quantities, o.prices, o.states, o.reasons, o.owners) WITH ORDINALITY
     l (product_id, quantity, price, state, reason, owner, n);

-- The money of orders about which the provider was asked, and has answered or is still to be asked.
CREATE VIEW payments AS
SELECT order_id, payment::text AS status, total_cents AS amount_cents, charge_id, paid_at AS charged_at, refunded_at
FROM orders WHERE payment IS NOT NULL;

-- Lines where their units count: those at home as their order has them, the others as their products' owners do.  One without a
-- price was never held.
CREATE VIEW stock_lines AS
SELECT o.order_id, o.user_id, l.product_id, l.quantity, l.price, l.state, o.created_at AS held_at,
       coalesce(o.paid_at, o.cancelled_at) AS ended_at, CASE WHEN o.paid_at IS NOT NULL THEN o.cancelled_at END AS returned_at
FROM orders o CROSS JOIN LATERAL
     unnest(o.product_ids, o.quantities, o.prices, o.states, o.owners) l (product_id, quantity, price, state, owner)
WHERE coalesce(l.owner, o.home) = o.home
UNION ALL
SELECT order_id, user_id, product_id, quantity, price, state, held_at, ended_at, returned_at FROM holds;

-- What the ledger has of these lines, and from when: its rows are of the transactions that moved the lines.
CREATE VIEW line_movements AS
SELECT l.order_id, l.product_id, l.quantity, m.movement, m.at
FROM stock_lines l CROSS JOIN LATERAL (VALUES
    ('hold'::movement, l.held_at),
    (CASE WHEN l.state = 'c' OR l.returned_at IS NOT NULL THEN 'commit' ELSE 'release' END::movement, l.ended_at),
    ('return'::movement, l.returned_at)) m (movement, at)
WHERE l.price IS NOT NULL AND m.at IS NOT NULL;
