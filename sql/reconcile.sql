-- What `orderstream reconcile` asks of Postgres, all of one round in one snapshot; then its repairs, each under row locks.

-- name: clock
-- The first statement of a round: every change that the snapshot has began before this.
SELECT clock_timestamp();

-- name: orders
-- Orders with their payment and lines: all of them.
SELECT o.order_id::text, o.status::text, o.reason::text, o.user_id, o.payment_method, o.total_cents,
       o.source_partition, o.source_offset,
       extract(epoch FROM now() - o.created_at)::float8 AS age_s,
       extract(epoch FROM now() - coalesce(o.cancelled_at, o.confirmed_at, o.paid_at, o.reserved_at, o.created_at))::float8
         AS moved_s,
       o.paid_at IS NOT NULL AS paid, p.status::text AS payment, p.charge_id, p.amount_cents,
       l.product_ids, l.quantities, l.states
FROM orders o
LEFT JOIN payments p ON p.order_id = o.order_id
LEFT JOIN (SELECT order_id, array_agg(product_id) AS product_ids, array_agg(quantity) AS quantities,
                  array_agg(state::text) AS states FROM order_lines GROUP BY order_id) l ON l.order_id = o.order_id;

-- name: some_orders
-- The same of the orders $1, and of those taken in at or after $2 (null: none).
WITH wanted AS (
    SELECT order_id FROM orders WHERE order_id = ANY ($1::uuid[])
    UNION SELECT order_id FROM orders WHERE created_at >= $2
)
SELECT o.order_id::text, o.status::text, o.reason::text, o.user_id, o.payment_method, o.total_cents,
       o.source_partition, o.source_offset,
       extract(epoch FROM now() - o.created_at)::float8 AS age_s,
       extract(epoch FROM now() - coalesce(o.cancelled_at, o.confirmed_at, o.paid_at, o.reserved_at, o.created_at))::float8
         AS moved_s,
       o.paid_at IS NOT NULL AS paid, p.status::text AS payment, p.charge_id, p.amount_cents,
       l.product_ids, l.quantities, l.states
FROM wanted w JOIN orders o ON o.order_id = w.order_id
LEFT JOIN payments p ON p.order_id = o.order_id
LEFT JOIN LATERAL (SELECT array_agg(product_id) AS product_ids, array_agg(quantity) AS quantities,
                          array_agg(state::text) AS states FROM order_lines x WHERE x.order_id = o.order_id) l ON true;

-- name: products
-- The counts of every product, and the sums of its ledger; of these, what was sold to orders that were removed since.
SELECT coalesce(s.product_id, g.product_id) AS product_id, s.initial, s.received, s.adjusted, s.sold, s.reserved, s.on_hand,
       s.version, s.gate_generation AS generation, coalesce(g.initials, 0) AS g_initials,
       coalesce(g.initial, 0) AS g_initial, coalesce(g.received, 0) AS g_received, coalesce(g.adjusted, 0) AS g_adjusted,
       coalesce(g.sold, 0) AS g_sold, coalesce(g.reserved, 0) AS g_reserved, coalesce(g.carried, 0) AS carried
FROM stock s FULL JOIN (
    SELECT product_id, count(*) FILTER (WHERE movement = 'initial') AS initials,
           (sum(quantity) FILTER (WHERE movement = 'initial'))::bigint AS initial,
           (sum(quantity) FILTER (WHERE movement = 'receive'))::bigint AS received,
           (sum(quantity) FILTER (WHERE movement = 'adjust'))::bigint AS adjusted,
           (coalesce(sum(quantity) FILTER (WHERE movement IN ('commit', 'carried')), 0)
             - coalesce(sum(quantity) FILTER (WHERE movement = 'return'), 0))::bigint AS sold,
           (sum(quantity) FILTER (WHERE movement = 'carried'))::bigint AS carried,
           (coalesce(sum(quantity) FILTER (WHERE movement = 'hold'), 0)
             - coalesce(sum(quantity) FILTER (WHERE movement IN ('commit', 'release')), 0))::bigint AS reserved
    FROM stock_ledger GROUP BY product_id
) g ON g.product_id = s.product_id;

-- name: users
-- Limited products of which the units counted for users are not those of their lines: how many users, and one of them.
SELECT product_id, count(*) AS users, min(user_id) AS user_id,
       (array_agg(must ORDER BY user_id))[1] AS must, (array_agg(counted ORDER BY user_id))[1] AS counted
FROM (
    SELECT coalesce(u.product_id, l.product_id) AS product_id, coalesce(u.user_id, l.user_id) AS user_id,
           coalesce(l.units, 0)::bigint AS must, coalesce(u.units, 0)::bigint AS counted
    FROM user_units u FULL JOIN (
        SELECT l.product_id, o.user_id, sum(l.quantity) AS units
        FROM stock s JOIN order_lines l ON l.product_id = s.product_id JOIN orders o ON o.order_id = l.order_id
        WHERE s.limit_per_user IS NOT NULL AND l.state IN ('held', 'committed') GROUP BY l.product_id, o.user_id
    ) l ON l.product_id = u.product_id AND l.user_id = u.user_id
) x WHERE must <> counted GROUP BY product_id;

-- name: count_users
SELECT count_users($1);

-- name: moves
-- What became of stock commands: those with these ids; $1 null: of all that there are.
SELECT source_id::text, product_id, movement::text, quantity, at FROM stock_ledger
WHERE movement IN ('receive', 'adjust') AND ($1::uuid[] IS NULL OR source_id = ANY ($1::uuid[]));

-- name: lock_order
-- One order, its row locked with those of its lines, in the order in which the stages lock.
SELECT order_id FROM orders WHERE order_id = $1 FOR UPDATE;

-- name: lock_lines
SELECT product_id, quantity, unit_price_cents, state::text, reason::text FROM order_lines
WHERE order_id = $1 ORDER BY product_id FOR UPDATE;

-- name: traces_left
-- Whether parts of an order are left although its row no longer exists: taken in again, it would conflict with them.
SELECT EXISTS (SELECT FROM stock_ledger WHERE source_id = $1) OR EXISTS (SELECT FROM order_lines WHERE order_id = $1)
    OR EXISTS (SELECT FROM payments WHERE order_id = $1);

-- name: order_movements
-- What the ledger has of an order.
SELECT product_id, array_agg(movement::text) AS movements FROM stock_ledger WHERE source_id = $1 GROUP BY product_id;

-- name: prices
SELECT product_id, price_cents FROM products WHERE product_id = ANY ($1::text[]);

-- name: put_order
-- Write an order's row as its record and its events say.
INSERT INTO orders (order_id, status, reason, line_count, lines_committed, total_cents, source_partition, source_offset,
                    user_id, payment_method, idempotency_key, placed_at, created_at, reserved_at, paid_at, confirmed_at,
                    cancelled_at)
VALUES ($1, $2::text::order_status, $3::text::cancel_reason, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)
ON CONFLICT (order_id) DO UPDATE SET
    status = excluded.status, reason = excluded.reason, line_count = excluded.line_count,
    lines_committed = excluded.lines_committed, total_cents = excluded.total_cents, user_id = excluded.user_id,
    payment_method = excluded.payment_method, reserved_at = excluded.reserved_at, paid_at = excluded.paid_at,
    confirmed_at = excluded.confirmed_at, cancelled_at = excluded.cancelled_at;

-- name: put_line
INSERT INTO order_lines (order_id, product_id, quantity, unit_price_cents, state, reason)
VALUES ($1, $2, $3, $4, $5::text::line_state, $6::text::cancel_reason)
ON CONFLICT (order_id, product_id) DO UPDATE SET
    quantity = excluded.quantity, unit_price_cents = excluded.unit_price_cents, state = excluded.state,
    reason = excluded.reason;

-- name: drop_other_lines
-- Lines that the order's record does not have.
DELETE FROM order_lines WHERE order_id = $1 AND product_id <> ALL ($2::text[]);

-- name: put_payment
INSERT INTO payments (order_id, status, amount_cents, charge_id) VALUES ($1, $2::text::payment_status, $3, $4)
ON CONFLICT (order_id) DO UPDATE SET
    status = excluded.status, amount_cents = excluded.amount_cents, charge_id = excluded.charge_id, refunded_at = NULL;

-- name: give_back
-- A charge of an order that has ended without being paid: the owner's timer gives it back.
UPDATE payments SET status = 'REFUND_DUE' WHERE order_id = $1 AND status = 'SUCCESS';

-- name: lock_product
SELECT product_id, initial, received, adjusted, sold, reserved, on_hand, gate_generation AS generation, version,
       limit_per_user
FROM stock WHERE product_id = $1 FOR UPDATE;

-- name: write_missing
-- Ledger entries that the lines of a product call for and that are not there; the caller holds the product's row lock.
WITH called_for AS (
    SELECT l.order_id, l.quantity, m.movement::movement
    FROM order_lines l CROSS JOIN LATERAL unnest(CASE l.state WHEN 'held' THEN ARRAY['hold']
        WHEN 'committed' THEN ARRAY['hold', 'commit'] WHEN 'released' THEN ARRAY['hold', 'release']
        WHEN 'returned' THEN ARRAY['hold', 'commit', 'return'] ELSE '{}'::text[] END)
        m (movement)
    WHERE l.product_id = $1
), written AS (
    INSERT INTO stock_ledger (product_id, source_id, movement, quantity, reason)
    SELECT $1, order_id, movement, quantity, 'reconcile: was missing' FROM called_for
    ON CONFLICT DO NOTHING RETURNING movement, quantity
)
SELECT count(*) AS entries, (coalesce(sum(quantity) FILTER (WHERE movement = 'commit'), 0)
       - coalesce(sum(quantity) FILTER (WHERE movement = 'return'), 0))::bigint AS sold FROM written;

-- name: write_entry
INSERT INTO stock_ledger (product_id, source_id, movement, quantity, reason)
VALUES ($1, $2, $3::text::movement, $4, $5) ON CONFLICT DO NOTHING RETURNING 1;

-- name: ledger_sums
-- The sums of a product's ledger. Judged are, of the commands, those written before $2 or named in $3 but for those named in
-- $4; and what countered them, whoever wrote it.
SELECT coalesce(sum(quantity) FILTER (WHERE movement = 'initial'), 0)::bigint AS initial,
       count(*) FILTER (WHERE movement = 'initial') AS initials,
       coalesce(sum(quantity) FILTER (WHERE movement = 'receive'), 0)::bigint AS received,
       coalesce(sum(quantity) FILTER (WHERE movement = 'adjust'), 0)::bigint AS adjusted,
       coalesce(sum(quantity) FILTER (WHERE movement = 'receive' AND judged), 0)::bigint AS received_judged,
       coalesce(sum(quantity) FILTER (WHERE movement = 'adjust' AND judged), 0)::bigint AS adjusted_judged,
       (coalesce(sum(quantity) FILTER (WHERE movement IN ('commit', 'carried')), 0)
         - coalesce(sum(quantity) FILTER (WHERE movement = 'return'), 0))::bigint AS sold,
       (coalesce(sum(quantity) FILTER (WHERE movement IN ('commit', 'carried') AND (at < $2 OR reason LIKE 'reconcile: %')), 0)
         - coalesce(sum(quantity) FILTER (WHERE movement = 'return' AND (at < $2 OR reason LIKE 'reconcile: %')), 0))::bigint
         AS sold_judged,
       (coalesce(sum(quantity) FILTER (WHERE movement = 'hold'), 0)
         - coalesce(sum(quantity) FILTER (WHERE movement IN ('commit', 'release')), 0))::bigint AS reserved
FROM (SELECT *, (at < $2 OR source_id = ANY ($3::uuid[]) OR reason LIKE 'reconcile: counters %')
                AND source_id <> ALL ($4::uuid[]) AS judged
      FROM stock_ledger WHERE product_id = $1) g;

-- name: line_sums
-- What the lines of a product say is held and sold, with what was sold to orders that were removed since.
SELECT coalesce(sum(quantity) FILTER (WHERE state = 'held'), 0)::bigint AS reserved,
       (coalesce(sum(quantity) FILTER (WHERE state = 'committed'), 0)
         + coalesce((SELECT quantity FROM stock_ledger WHERE product_id = $1 AND movement = 'carried'
                     AND source_id = '00000000-0000-0000-0000-000000000000'), 0))::bigint AS sold
FROM order_lines WHERE product_id = $1;

-- name: try_turn
-- Take the turn to repair the pipeline $1, if no other run has it.
SELECT pg_try_advisory_lock(hashtext('orderstream reconcile'), hashtext($1));

-- name: take_turn
-- Wait for it.
SELECT pg_advisory_lock(hashtext('orderstream reconcile'), hashtext($1));

-- name: end_turn
SELECT pg_advisory_unlock(hashtext('orderstream reconcile'), hashtext($1));

-- name: set_stock
UPDATE stock SET initial = $2, received = $3, adjusted = $4, sold = $5, reserved = $6, on_hand = $7,
                 version = version + 1, gate_generation = gate_generation + 1
WHERE product_id = $1 RETURNING version, gate_generation AS generation;

-- name: bump_generation
UPDATE stock SET gate_generation = gate_generation + 1 WHERE product_id = $1
RETURNING on_hand, reserved, version, gate_generation AS generation;

-- name: note_run
INSERT INTO reconcile_runs (at, resumed, records, seconds, orders, products, open_orders, drift, unrepaired)
VALUES (clock_timestamp(), $1, $2, $3, $4, $5, $6, $7::jsonb, $8::jsonb);

-- name: forget_runs
-- All but the newest $1.
DELETE FROM reconcile_runs WHERE at < (SELECT at FROM reconcile_runs ORDER BY at DESC OFFSET $1 - 1 LIMIT 1);
