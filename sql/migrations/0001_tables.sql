-- The durable truth: catalogue, stock counts, the ledger of their movements, orders, lines, payments.
--
-- No foreign keys between the hot tables: the stage functions write parent and child in one transaction, a check of a
-- reference costs as much as the row, and invariants.sql looks for orphans.

CREATE TYPE order_status AS ENUM ('CREATED', 'RESERVED', 'PAID', 'CONFIRMED', 'CANCELLED');
CREATE TYPE cancel_reason AS ENUM
    ('unknown_product', 'insufficient_stock', 'payment_declined', 'expired', 'cancelled_by_user');
CREATE TYPE line_state AS ENUM ('pending', 'held', 'refused', 'committed', 'released');
CREATE TYPE payment_status AS ENUM ('SUCCESS', 'FAILED', 'REFUND_DUE', 'REFUNDED');
CREATE TYPE movement AS ENUM ('initial', 'receive', 'adjust', 'hold', 'commit', 'release');

CREATE TABLE products (
    product_id  text PRIMARY KEY,
    name        text   NOT NULL,
    price_cents bigint NOT NULL CONSTRAINT products_price_not_negative CHECK (price_cents >= 0),
    created_at  timestamptz NOT NULL DEFAULT now()
);

-- One narrow row a product, updated in place (HOT): nothing but the primary key is indexed.
CREATE TABLE stock (
    product_id      text PRIMARY KEY,
    on_hand         bigint NOT NULL,               -- units in the house, held ones included
    reserved        bigint NOT NULL DEFAULT 0,     -- of these, held for orders
    initial         bigint NOT NULL,
    received        bigint NOT NULL DEFAULT 0,
    adjusted        bigint NOT NULL DEFAULT 0,
    sold            bigint NOT NULL DEFAULT 0,
    version         bigint NOT NULL DEFAULT 1,     -- grows with each change; Redis takes no older counts than it has
    gate_generation bigint NOT NULL DEFAULT 1,     -- grows when a change passed Redis by; makes what Redis knows void
    CONSTRAINT stock_on_hand_not_negative  CHECK (on_hand >= 0),
    CONSTRAINT stock_reserved_not_negative CHECK (reserved >= 0),
    CONSTRAINT stock_not_oversold          CHECK (reserved <= on_hand),
    CONSTRAINT stock_sold_not_negative     CHECK (sold >= 0),
    CONSTRAINT stock_adds_up               CHECK (initial + received + adjusted = on_hand + sold)
) WITH (fillfactor = 50);

-- Append-only. source_id is the order, or the stock command, that moved the units.
CREATE TABLE stock_ledger (
    product_id text     NOT NULL,
    source_id  uuid     NOT NULL,
    movement   movement NOT NULL,
    quantity   bigint   NOT NULL,                  -- units; negative only for an adjustment downwards
    reason     text,
    at         timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT stock_ledger_once PRIMARY KEY (source_id, product_id, movement),
    CONSTRAINT stock_ledger_sign CHECK (quantity > 0 OR movement = 'adjust' OR (movement = 'initial' AND quantity = 0))
);

CREATE TABLE orders (
    order_id         uuid PRIMARY KEY,
    status           order_status NOT NULL,
    reason           cancel_reason,
    line_count       int  NOT NULL,
    lines_committed  int  NOT NULL DEFAULT 0,
    total_cents      bigint,
    source_partition int  NOT NULL,                -- where on the topic `orders` the order stands
    source_offset    bigint NOT NULL,
    user_id          text NOT NULL,
    payment_method   text NOT NULL,
    idempotency_key  text,
    placed_at        timestamptz,
    created_at       timestamptz NOT NULL,
    reserved_at      timestamptz,
    paid_at          timestamptz,
    confirmed_at     timestamptz,
    cancelled_at     timestamptz,
    CONSTRAINT orders_have_lines       CHECK (line_count > 0 AND lines_committed BETWEEN 0 AND line_count),
    CONSTRAINT orders_reserved_total   CHECK (reserved_at IS NULL OR total_cents IS NOT NULL),
    CONSTRAINT orders_status_times     CHECK (CASE status
        WHEN 'CREATED'   THEN reserved_at IS NULL AND paid_at IS NULL AND confirmed_at IS NULL AND cancelled_at IS NULL
        WHEN 'RESERVED'  THEN reserved_at IS NOT NULL AND paid_at IS NULL AND confirmed_at IS NULL AND cancelled_at IS NULL
        WHEN 'PAID'      THEN paid_at IS NOT NULL AND confirmed_at IS NULL AND cancelled_at IS NULL
        WHEN 'CONFIRMED' THEN paid_at IS NOT NULL AND confirmed_at IS NOT NULL AND cancelled_at IS NULL
        WHEN 'CANCELLED' THEN confirmed_at IS NULL AND cancelled_at IS NOT NULL END),
    CONSTRAINT orders_cancelled_reason CHECK ((status = 'CANCELLED') = (reason IS NOT NULL)),
    CONSTRAINT orders_confirmed_whole  CHECK ((status = 'CONFIRMED') = (lines_committed = line_count))
) WITH (fillfactor = 70);

-- The expiry timer reads this one, oldest first; created_at never changes, so updates of an order stay in place.
CREATE INDEX orders_created_at ON orders (created_at);

CREATE TABLE order_lines (
    order_id         uuid NOT NULL,
    product_id       text NOT NULL,
    quantity         int  NOT NULL CONSTRAINT order_lines_quantity_positive CHECK (quantity > 0),
    unit_price_cents bigint,                       -- as in the catalogue when the line was held
    state            line_state NOT NULL,
    reason           cancel_reason,
    PRIMARY KEY (order_id, product_id),
    CONSTRAINT order_lines_held_price     CHECK (state IN ('pending', 'refused') OR unit_price_cents IS NOT NULL),
    CONSTRAINT order_lines_refused_reason CHECK ((state = 'refused') = (reason IS NOT NULL))
) WITH (fillfactor = 70);

-- What the provider said, one row an order. REFUND_DUE: charged, but the order had ended before the answer came.
CREATE TABLE payments (
    order_id     uuid PRIMARY KEY,
    status       payment_status NOT NULL,
    amount_cents bigint NOT NULL,
    charge_id    text,
    created_at   timestamptz NOT NULL DEFAULT now(),
    refunded_at  timestamptz,
    CONSTRAINT payments_charged_id     CHECK ((status = 'FAILED') = (charge_id IS NULL)),
    CONSTRAINT payments_refunded_at    CHECK ((status = 'REFUNDED') = (refunded_at IS NOT NULL))
) WITH (fillfactor = 90);
