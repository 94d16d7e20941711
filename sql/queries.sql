-- What is asked by name outside of the stages (stages.sql).

-- name: user_units
-- Who has how many units of these limited products; the caller holds their row locks.
SELECT product_id, user_id, units FROM user_units WHERE product_id = ANY ($1::text[]);

-- name: invalidate_gate
-- Invalidate what Redis knows of these products: it missed a change.
WITH locked AS (SELECT product_id FROM stock WHERE product_id = ANY ($1::text[]) ORDER BY product_id FOR UPDATE)
UPDATE stock s SET generation = s.generation + 1 FROM locked l WHERE s.product_id = l.product_id
RETURNING s.product_id, s.generation;

-- name: now
SELECT now();

-- name: order
-- One order, for people; its lines as JSON. charged_at: when the provider took the money, or declined.
SELECT o.order_id::text, o.status::text, o.reason::text, o.user_id, o.payment_method, o.idempotency_key, o.total_cents,
       o.placed_at, o.created_at, o.reserved_at, o.paid_at, o.confirmed_at, o.cancelled_at,
       o.home, o.source_offset, o.command_partition, o.command_offset,
       o.payment::text AS payment_status, CASE WHEN o.payment IS NOT NULL THEN o.total_cents END AS amount_cents, o.charge_id,
       coalesce(o.paid_at, CASE o.payment WHEN 'FAILED' THEN o.cancelled_at END) AS charged_at, o.refunded_at,
       r.refused_at, r.retried_at, r.closed_at, r.why AS closed_why,
       (SELECT json_agg(json_build_object('product_id', l.product_id, 'quantity', l.quantity,
                                          'unit_price_cents', l.unit_price_cents, 'state', l.state, 'reason', l.reason)
                        ORDER BY l.line)
        FROM order_lines l WHERE l.order_id = o.order_id) AS lines
FROM orders o LEFT JOIN refusals r ON r.order_id = o.order_id WHERE o.order_id = $1::uuid;

-- name: order_states
-- Where these orders stand, and what tells each from another one under its id; of one that was removed only that.
SELECT order_id::text, home, status::text, reason::text, user_id, payment_method, product_ids, quantities
FROM orders WHERE order_id = ANY ($1::uuid[])
UNION ALL SELECT order_id::text, NULL, 'REMOVED', NULL, NULL, NULL, NULL, NULL
FROM removed_orders WHERE order_id = ANY ($1::uuid[]);

-- name: removed
-- Those of these orders that were removed.
SELECT order_id::text FROM removed_orders WHERE order_id = ANY ($1::uuid[]);

-- name: order_histories
-- What happened to these orders, in their rows alone; for those who watch them.
SELECT order_id::text, user_id, home, source_offset, status::text, reason::text, created_at, reserved_at, paid_at, confirmed_at,
       cancelled_at, command_partition, command_offset
FROM orders WHERE order_id = ANY ($1::uuid[]);

-- name: products
-- Products with their counts, by id; $1 null for all.
SELECT product_id, name, price_cents, on_hand, on_hand - reserved AS available, reserved, sold, initial, received, adjusted,
       version, generation, limit_per_user, retired,
       coalesce((SELECT l.claim FROM lanes l WHERE l.partition = stock.partition AND l.lane = 'intake'), 0) AS claim
FROM stock WHERE $1::text[] IS NULL OR product_id = ANY ($1::text[]) ORDER BY product_id LIMIT $2;

-- name: ended
-- Of these orders, those that have ended: how and when, and what tells each from another one under its id.
SELECT order_id::text, status::text, reason::text, coalesce(cancelled_at, confirmed_at) AS ended_at,
       user_id, payment_method, product_ids, quantities
FROM orders WHERE order_id = ANY ($1::uuid[]) AND status IN ('CONFIRMED', 'CANCELLED');

-- name: last_reconcile
-- What the last run of `orderstream reconcile` found.
SELECT extract(epoch FROM at)::float8 AS at, records, seconds, open_orders, drift::text, unrepaired::text
FROM reconcile_runs ORDER BY at DESC LIMIT 1;

-- name: refusals
-- Orders whose money the provider does not give back, the oldest first: those that nobody has closed, or all ($1); of $2 only,
-- where it is not null; $3 at most.
SELECT o.order_id::text, o.home, o.user_id, o.total_cents, o.charge_id, o.reason::text, o.paid_at, o.cancelled_at,
       o.payment::text, r.refused_at, r.retried_at, r.closed_at, r.why
FROM refusals r JOIN orders o ON o.order_id = r.order_id
WHERE ($1 OR (r.closed_at IS NULL AND o.payment = 'REFUSED')) AND ($2::uuid[] IS NULL OR r.order_id = ANY ($2))
ORDER BY r.refused_at, r.order_id LIMIT $3;

-- name: refusals_open
SELECT count(*) FROM refusals r JOIN orders o ON o.order_id = r.order_id AND o.payment = 'REFUSED' WHERE r.closed_at IS NULL;

-- name: note_retried
UPDATE refusals SET retried_at = now() WHERE order_id = ANY ($1::uuid[]) AND closed_at IS NULL;

-- name: close_refusals
-- Close those of these that are open, for this reason.
UPDATE refusals r SET closed_at = now(), why = $2 FROM orders o
WHERE r.order_id = ANY ($1::uuid[]) AND r.closed_at IS NULL AND o.order_id = r.order_id AND o.payment = 'REFUSED'
RETURNING r.order_id::text;

-- name: orders_of_user
-- Orders of the customer $1 before the place ($2, $3), newest first. Reads $4 of them at most and returns those in the
-- status $5 (null: any), $6 at most; and, marked `edge`, the last one read, when there may be more behind it.
WITH looked AS (
    SELECT order_id::text, status::text, reason::text, user_id, payment_method, idempotency_key, total_cents, placed_at,
           created_at, coalesce(cancelled_at, confirmed_at, paid_at, reserved_at, created_at) AS updated_at
    FROM orders
    WHERE hashtextextended(user_id, 0) = hashtextextended($1, 0) AND created_at <= $2 AND (created_at, order_id) < ($2, $3::uuid)
    ORDER BY orders.created_at DESC, orders.order_id DESC LIMIT $4
), found AS (  -- the user only here: with him above, the planner takes a customer of many orders for one of few
    SELECT * FROM looked WHERE user_id = $1 AND ($5::text IS NULL OR status = $5::text)
    ORDER BY created_at DESC, order_id::uuid DESC LIMIT $6
)
(SELECT *, false AS edge FROM found ORDER BY created_at DESC, order_id::uuid DESC)
UNION ALL
(SELECT *, true FROM looked WHERE (SELECT count(*) FROM looked) = $4 ORDER BY created_at, order_id::uuid LIMIT 1);

-- name: all_orders
-- As orders_of_user, of all customers: $1 is null.
WITH looked AS (
    SELECT order_id::text, status::text, reason::text, user_id, payment_method, idempotency_key, total_cents, placed_at,
           created_at, coalesce(cancelled_at, confirmed_at, paid_at, reserved_at, created_at) AS updated_at
    FROM orders
    WHERE $1::text IS NULL AND created_at <= $2 AND (created_at, order_id) < ($2, $3::uuid)
    ORDER BY orders.created_at DESC, orders.order_id DESC LIMIT $4
), found AS (
    SELECT * FROM looked WHERE $5::text IS NULL OR status = $5::text
    ORDER BY created_at DESC, order_id::uuid DESC LIMIT $6
)
(SELECT *, false AS edge FROM found ORDER BY created_at DESC, order_id::uuid DESC)
UNION ALL
(SELECT *, true FROM looked WHERE (SELECT count(*) FROM looked) = $4 ORDER BY created_at, order_id::uuid LIMIT 1);

-- name: products_page
-- Products with their counts, by id, behind the id $1; $2 at most; those that are retired ($3), or not.
SELECT product_id, name, price_cents, on_hand - reserved AS available, reserved, sold, limit_per_user, retired
FROM stock WHERE product_id > $1 AND retired = $3 ORDER BY product_id LIMIT $2;

-- name: commands_undecided
-- How many of these stock commands nobody has decided yet.
SELECT count(*) FROM unnest($1::uuid[]) c (id) WHERE NOT EXISTS (SELECT FROM stock_commands k WHERE k.command_id = c.id);

-- name: commands_decided
-- Which of these stock commands were decided: those that were applied, and those that were refused since $2.
SELECT command_id::text, outcome FROM stock_commands
WHERE command_id = ANY ($1::uuid[]) AND (outcome = 'applied' OR decided_at >= $2);

-- name: commands_decided
-- Which of these stock commands were decided: those that were applied, and those that were refused since $2.
SELECT command_id::text, outcome FROM stock_commands
WHERE command_id = ANY ($1::uuid[]) AND (outcome = 'applied' OR decided_at >= $2);

-- name: lanes_claimed
-- Whether a worker has ever claimed a lane.
SELECT EXISTS (SELECT FROM lanes);

-- name: load_catalogue
SELECT load_catalogue(ids => $1, owners => $2, names => $3, prices => $4, quantities => $5);

-- name: stock_command
-- How a stock command was decided, or nothing.
SELECT command_id::text, product_id, command, quantity, name, price_cents, reason, more, outcome, change, decided_at
FROM stock_commands WHERE command_id = $1::uuid;

-- name: ledger_page
-- What people and deliveries moved of the product $1 before the place ($2, $3), newest first; $4 at most.
SELECT movement::text, quantity, reason, actor, at, command_id::text AS source_id
FROM ledger
WHERE product_id = $1 AND command_id IS NOT NULL AND at <= $2 AND (at, command_id) < ($2, $3::uuid)
ORDER BY ledger.at DESC, ledger.command_id DESC LIMIT $4;

-- name: orders_before
-- How many orders were taken in before $1.
SELECT count(*) FROM orders WHERE created_at < $1;

-- name: remove_orders
SELECT * FROM remove_orders(since => $1, since_id => $2, size => $3, until => $4, kafka_until => $5, log_starts => $6,
                            really => $7);

-- name: remove_strays
SELECT remove_strays($1, $2, $3, $4);

-- name: idle_users
-- Products with users who have nothing of them any more: how many.
SELECT product_id, count(*) AS users FROM user_units WHERE units = 0 GROUP BY product_id ORDER BY product_id;

-- name: forget_users
SELECT forget_users($1);

-- name: letters_to_forget
-- Notes before $2 about dead letters that their topic does not have any more; $1: its first offsets by partition.
SELECT count(*) FROM letter_actions a JOIN unnest($1::bigint[]) WITH ORDINALITY s (first, n) ON s.n - 1 = a.letter_partition
WHERE a.letter_offset < s.first AND greatest(a.letter_at, a.begun_at, a.done_at) < $2;

-- name: forget_letters
WITH forgotten AS (
    DELETE FROM letter_actions a USING unnest($1::bigint[]) WITH ORDINALITY s (first, n)
    WHERE s.n - 1 = a.letter_partition AND a.letter_offset < s.first
      AND greatest(a.letter_at, a.begun_at, a.done_at) < $2 RETURNING 1
) SELECT count(*) FROM forgotten;

-- name: rejection
-- The last record that names an order and is none.
SELECT partition, "offset", reason, detail, rejected_at FROM rejections
WHERE order_id = $1::uuid ORDER BY rejected_at DESC LIMIT 1;

-- name: forget_rejections
-- Those before $1 and before $2 (null: whenever).
DELETE FROM rejections WHERE rejected_at < least($1::timestamptz, $2);

-- name: cancels_to_forget
-- Cancels kept before $1 and before $2 (null: whenever), whose order has not come.
SELECT count(*) FROM kept_commands WHERE kept_at < least($1::timestamptz, $2);

-- name: forget_cancels
WITH forgotten AS (
    DELETE FROM kept_commands WHERE kept_at < least($1::timestamptz, $2) RETURNING 1
) SELECT count(*) FROM forgotten;

-- name: product_sales
-- What each product has sold and brought, those that sold most first; $1 at most.
SELECT product_id, name, price_cents, available, reserved, sold, revenue_cents, limit_per_user
FROM product_sales ORDER BY sold DESC, product_id LIMIT $1;

-- name: orders_of_product
-- Orders that asked for the product $1, before the place ($2, $3), newest first; $4 at most. Those that held it are found by the
-- ledger, the others among the $5 orders that came last before the place.
WITH held AS (
    SELECT unnest(g.order_ids) AS order_id
    FROM (SELECT l.order_ids, sum(cardinality(l.order_ids)) OVER (ORDER BY l.at DESC ROWS UNBOUNDED PRECEDING)
                              - cardinality(l.order_ids) AS before
          FROM (SELECT at, order_ids FROM ledger WHERE product_id = $1 AND movement = 'hold' AND at <= $2
                ORDER BY at DESC LIMIT $4) l) g
    WHERE g.before < $4
), others AS (
    SELECT o.order_id
    FROM (SELECT order_id, product_ids FROM orders WHERE created_at <= $2 ORDER BY created_at DESC LIMIT $5) o
    WHERE o.product_ids @> ARRAY[$1]
)
SELECT o.order_id::text, o.status::text, o.reason::text, o.user_id, o.total_cents, o.created_at, o.product_ids, o.quantities
FROM orders o
WHERE o.order_id IN (SELECT order_id FROM held UNION SELECT order_id FROM others) AND (o.created_at, o.order_id) < ($2, $3::uuid)
ORDER BY o.created_at DESC, o.order_id DESC LIMIT $4;

-- name: left_then
-- Of the refused lines of the order $1: how many units of the product were left when it was decided, by what the ledger has
-- moved since, $2 rows at most; null where that is more. Orders of the same home before it in its transaction came first.
SELECT x.product_id,
       CASE WHEN later.rows < $2 THEN s.on_hand - s.reserved - later.change - coalesce(first.units, 0) END::bigint AS units
FROM orders o
CROSS JOIN LATERAL unnest(o.product_ids, o.reasons) x (product_id, reason)
LEFT JOIN holds h ON h.order_id = o.order_id AND h.product_id = x.product_id
JOIN stock s ON s.product_id = x.product_id
CROSS JOIN LATERAL (SELECT coalesce(h.held_at, o.created_at) AS at) decided
CROSS JOIN LATERAL (
    SELECT count(*) AS rows,
           coalesce(sum(CASE g.movement WHEN 'hold' THEN -g.quantity WHEN 'commit' THEN 0 ELSE g.quantity END), 0) AS change
    FROM (SELECT l.movement, l.quantity FROM ledger l
          WHERE l.product_id = x.product_id AND l.at >= decided.at LIMIT $2) g
) later
CROSS JOIN LATERAL (
    SELECT sum(u.quantity) AS units
    FROM ledger l CROSS JOIN LATERAL unnest(l.order_ids, l.quantities) u (order_id, quantity)
    JOIN orders e ON e.order_id = u.order_id AND e.home = o.home AND e.source_offset < o.source_offset
    WHERE l.product_id = x.product_id AND l.at = decided.at AND l.movement = 'hold'
) first
WHERE o.order_id = $1::uuid AND x.reason = 'insufficient_stock';

-- name: reconcile_runs
-- The last runs of `orderstream reconcile`, newest first; $1 at most.
SELECT at, resumed, records, seconds, orders, products, open_orders, drift::text, unrepaired::text
FROM reconcile_runs ORDER BY at DESC LIMIT $1;
