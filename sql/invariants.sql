-- The promises, each as a query that returns only offenders: what, which one, what was found.
-- `orderstream verify`, the tests and the benchmarks all ask these. $1: seconds that something may be late; $2: the time of a
-- hold, in seconds. Those without a parameter hold at every moment, also while orders flow.

-- name: stock adds up
-- initial + received + adjusted = available + reserved + sold; what is owed was adjusted by nobody.
SELECT product_id AS subject, format('initial %s + received %s + adjusted %s, but available %s + reserved %s + sold %s',
       initial, received, adjusted - owed, on_hand - reserved, reserved, sold) AS found
FROM stock WHERE initial + received + adjusted - owed <> (on_hand - reserved) + reserved + sold;

-- name: nothing is negative
SELECT product_id AS subject, format('on hand %s, reserved %s, available %s, sold %s', on_hand, reserved,
       on_hand - reserved, sold) AS found
FROM stock WHERE on_hand < 0 OR reserved < 0 OR on_hand < reserved OR sold < 0;

-- name: the ledger explains the counts
SELECT coalesce(s.product_id, g.product_id) AS subject,
       format('counts: initial %s received %s adjusted %s sold %s reserved %s; ledger: %s %s %s %s %s', s.initial,
              s.received, s.adjusted, s.sold, s.reserved, g.initial, g.received, g.adjusted, g.sold, g.reserved) AS found
FROM stock s FULL JOIN (
    SELECT product_id,
           coalesce(sum(quantity) FILTER (WHERE movement = 'initial'), 0) AS initial,
           coalesce(sum(quantity) FILTER (WHERE movement = 'receive'), 0) AS received,
           coalesce(sum(quantity) FILTER (WHERE movement = 'adjust'), 0) AS adjusted,
           coalesce(sum(quantity) FILTER (WHERE movement IN ('commit', 'carried')), 0)
             - coalesce(sum(quantity) FILTER (WHERE movement = 'return'), 0) AS sold,
           coalesce(sum(quantity) FILTER (WHERE movement = 'hold'), 0)
             - coalesce(sum(quantity) FILTER (WHERE movement IN ('commit', 'release')), 0) AS reserved
    FROM ledger GROUP BY product_id
) g ON g.product_id = s.product_id
WHERE (s.initial, s.received, s.adjusted, s.sold, s.reserved) IS DISTINCT FROM
      (g.initial, g.received, g.adjusted, g.sold, g.reserved);

-- name: the ledger adds up
-- Each row's units are those of its orders, and a step of its product's owner has written it.
SELECT g.product_id AS subject, format('%s of %s, by step %s of partition %s: %s orders, %s', g.movement, g.quantity,
       g.sequence, g.partition, cardinality(g.order_ids), g.quantities) AS found
FROM ledger g LEFT JOIN stock s ON s.product_id = g.product_id
LEFT JOIN lanes k ON k.partition = g.partition AND k.lane = g.lane
WHERE s.partition IS DISTINCT FROM g.partition OR g.sequence > coalesce(k.sequence, 0)
   OR (g.order_ids IS NOT NULL AND (cardinality(g.order_ids) = cardinality(g.quantities)
       AND (0 < ALL (g.quantities) OR g.reason LIKE 'reconcile: counters %')
       AND g.quantity = (SELECT sum(q) FROM unnest(g.quantities) q)) IS NOT TRUE);

-- name: held lines explain the reservations
-- And committed lines the sales, with what was sold to orders that were removed since.
SELECT s.product_id AS subject,
       format('reserved %s, held lines %s; sold %s, committed lines %s, carried forward %s', s.reserved,
              coalesce(l.held, 0), s.sold, coalesce(l.committed, 0), coalesce(c.quantity, 0)) AS found
FROM stock s LEFT JOIN (
    SELECT product_id, coalesce(sum(quantity) FILTER (WHERE state = 'h'), 0) AS held,
           coalesce(sum(quantity) FILTER (WHERE state = 'c'), 0) AS committed
    FROM stock_lines GROUP BY product_id
) l ON l.product_id = s.product_id
LEFT JOIN (SELECT product_id, sum(quantity) AS quantity FROM ledger WHERE movement = 'carried' GROUP BY product_id) c
     ON c.product_id = s.product_id
WHERE s.reserved <> coalesce(l.held, 0) OR s.sold <> coalesce(l.committed, 0) + coalesce(c.quantity, 0);

-- name: every line is moved once
-- The ledger has of each line that was held its hold, and what settled it, once each and over its units; and of nothing else.
SELECT order_id::text AS subject, format('%s of %s of product %s at %s: the lines say %s times, the ledger %s', movement,
       quantity, product_id, at, sum(said), sum(there)) AS found
FROM (
    SELECT order_id, product_id, movement, quantity, at, 1 AS said, 0 AS there FROM line_movements
    UNION ALL  -- one that counters another has its units with the sign turned
    SELECT u.order_id, g.product_id, g.movement, abs(u.quantity), g.at, 0, sign(u.quantity)::int
    FROM ledger g CROSS JOIN LATERAL unnest(g.order_ids, g.quantities) u (order_id, quantity)
) m GROUP BY order_id, product_id, movement, quantity, at HAVING sum(said) <> sum(there);

-- name: every order has its lines
-- Each product once, with its units, its state and, where it is held, its price.
SELECT o.order_id::text AS subject, format('products %s, units %s, states %s, prices %s', o.product_ids, o.quantities,
       o.states, o.prices) AS found
FROM orders o CROSS JOIN LATERAL (
    SELECT count(*) = count(DISTINCT l.product_id) AND count(*) = count(l.state) AND bool_and(l.quantity > 0)
           AND bool_and(l.price >= 0 OR l.state NOT IN ('h', 'g', 'c', 'b', 'n')) AS sound
    FROM unnest(o.product_ids, o.quantities, o.states, o.prices) l (product_id, quantity, state, price)
) l WHERE l.sound IS NOT TRUE;

-- name: homes and owners agree on lines
-- Of a line whose product another home owns: its owner has it as the order's home has it, or is a step ahead. One that is
-- still held, although its order has settled it or is not there, is told of again when its time is over.
SELECT coalesce(l.order_id, h.order_id)::text AS subject,
       format('product %s: home %s has %s units %s, its owner %s has %s units %s', coalesce(l.product_id, h.product_id),
              l.home, l.quantity, coalesce(l.state, '-'), h.partition, h.quantity, coalesce(h.state, '-')) AS found
FROM (
    SELECT o.order_id, o.home, o.user_id, l.*
    FROM orders o CROSS JOIN LATERAL
         unnest(o.product_ids, o.quantities, o.states, o.prices, o.owners) l (product_id, quantity, state, price, owner)
    WHERE l.owner <> o.home
) l FULL JOIN holds h ON h.order_id = l.order_id AND h.product_id = l.product_id
WHERE CASE
    WHEN h.order_id IS NULL THEN l.state NOT IN ('a', 'l')
    WHEN h.state = 'h' AND coalesce(l.state, 'r') IN ('x', 'c', 'r', 'n')
        THEN h.held_at < now() - make_interval(secs => $1::float8 + $2::float8)
    WHEN l.order_id IS NULL THEN h.state NOT IN ('x', 'r')
    ELSE (h.partition, h.home, h.user_id, h.quantity) <> (l.owner, l.home, l.user_id, l.quantity) OR h.price <> l.price
         OR (l.state, h.state) NOT IN (('a', 'h'), ('a', 'x'), ('h', 'h'), ('x', 'x'), ('g', 'h'), ('g', 'c'), ('c', 'c'),
                                       ('l', 'h'), ('l', 'x'), ('l', 'r'), ('r', 'x'), ('r', 'r'),
                                       ('b', 'h'), ('b', 'c'), ('b', 'n'), ('n', 'n')) END;

-- name: an order is held whole or not at all
-- CONFIRMED: every line committed. PAID: committed, or its owner was told to. RESERVED: held. CREATED: one is asked for still.
-- CANCELLED: none committed, unless it was paid: then its lines return. No other order has a line that returned.
SELECT o.order_id::text AS subject, format('%s, but its lines are %s', o.status, array_to_string(o.states, '')) AS found
FROM orders o
WHERE (CASE o.status
    WHEN 'CREATED'   THEN o.states <@ '{a,h,x}'::"char"[] AND 'a' = ANY (o.states)
    WHEN 'RESERVED'  THEN o.states <@ '{h}'::"char"[]
    WHEN 'PAID'      THEN o.states <@ '{g,c}'::"char"[]
    WHEN 'CONFIRMED' THEN o.states <@ '{c}'::"char"[]
    WHEN 'CANCELLED' THEN o.states <@ CASE WHEN o.paid_at IS NULL THEN '{x,h,l,r}' ELSE '{h,c,b,n}' END::"char"[]
    END) IS NOT TRUE;

-- name: the total is what the lines cost
SELECT o.order_id::text AS subject, format('total %s, lines %s', o.total_cents, l.cost) AS found
FROM orders o CROSS JOIN LATERAL (
    SELECT sum(l.quantity * l.price) AS cost FROM unnest(o.quantities, o.prices) l (quantity, price)
) l WHERE o.reserved_at IS NOT NULL AND o.total_cents IS DISTINCT FROM l.cost;

-- name: charges minus refunds are the orders paid for
-- A charge stands for each order PAID or CONFIRMED, and for no other: where one may have been asked for an order that ended
-- without, it is void, or a void is due; one that was cancelled after it was paid is refunded, or a refund is due.
SELECT o.order_id::text AS subject, format('order %s, payment %s, charge %s', concat_ws(' ', o.status, o.reason), o.payment,
       o.charge_id) AS found
FROM orders o
WHERE (CASE
    WHEN o.status IN ('PAID', 'CONFIRMED') THEN o.payment = 'SUCCESS' AND o.charge_id IS NOT NULL
    WHEN o.status <> 'CANCELLED' THEN o.payment IS NULL
    WHEN o.paid_at IS NOT NULL THEN o.payment IN ('REFUND_DUE', 'REFUNDED', 'REFUSED')
    WHEN o.payment = 'FAILED' THEN o.reason = 'payment_declined'
    WHEN o.payment IS NULL THEN o.reserved_at IS NULL OR o.total_cents = 0
    ELSE o.payment IN ('VOID_DUE', 'VOIDED', 'REFUSED') END) IS NOT TRUE
   OR coalesce(o.payment IN ('REFUNDED', 'VOIDED'), false) <> (o.refunded_at IS NOT NULL);

-- name: no hold outlives its time
SELECT order_id::text AS subject, format('%s since %s', status, created_at) AS found FROM orders
WHERE status IN ('CREATED', 'RESERVED') AND created_at < now() - make_interval(secs => $1::float8 + $2::float8);

-- name: no order is paid and forgotten
SELECT order_id::text AS subject, format('PAID since %s', paid_at) AS found FROM orders
WHERE status = 'PAID' AND paid_at < now() - make_interval(secs => $1::float8);

-- name: cancelled orders hold nothing
-- Nor do other owners hold anything for them, a moment later.
SELECT order_id::text AS subject, format('CANCELLED since %s, its lines are %s', cancelled_at, array_to_string(states, ''))
       AS found
FROM orders
WHERE status = 'CANCELLED' AND (states && '{a,h,g,c}'::"char"[]
      OR (states && '{l,b}'::"char"[] AND cancelled_at < now() - make_interval(secs => $1::float8)));

-- name: what is not over waits
-- The home takes up from `waiting` what is due at the provider, and every order that is not over after a moment.
SELECT o.order_id::text AS subject, format('%s since %s, payment %s, lines %s', o.status, o.created_at, o.payment,
       array_to_string(o.states, '')) AS found
FROM orders o
WHERE (o.payment IN ('VOID_DUE', 'REFUND_DUE')
       OR (greatest(o.created_at, o.cancelled_at) < now() - make_interval(secs => $1::float8)
           AND (o.status IN ('CREATED', 'RESERVED', 'PAID') OR o.states && '{l,b}'::"char"[])))
  AND NOT EXISTS (SELECT FROM waiting w WHERE w.home = o.home AND w.order_id = o.order_id)
UNION ALL
SELECT w.order_id::text, format('waits at home %s since %s, and is no order of it', w.home, w.since)
FROM waiting w WHERE NOT EXISTS (SELECT FROM orders o WHERE o.order_id = w.order_id AND o.home = w.home);

-- name: no cancel is kept from its order
SELECT k.order_id::text AS subject, format('kept by partition %s since %s, its order is %s since %s', k.partition, k.kept_at,
       o.status, o.created_at) AS found
FROM kept_commands k JOIN orders o ON o.order_id = k.order_id
WHERE greatest(k.kept_at, o.created_at) < now() - make_interval(secs => $1::float8);

-- name: no user has more than a product's limit
-- Of what was ordered since the limit was set: a user who had more before keeps it.
SELECT format('user %s, product %s', l.user_id, s.product_id) AS subject,
       format('%s units since %s, at most %s', sum(l.quantity), s.limited_since, s.limit_per_user) AS found
FROM stock s JOIN stock_lines l ON l.product_id = s.product_id AND l.state IN ('h', 'c')
WHERE s.limit_per_user IS NOT NULL AND l.held_at >= s.limited_since
GROUP BY l.user_id, s.product_id HAVING sum(l.quantity) > s.limit_per_user;

-- name: the lines explain what users have
-- Of products with a limit: units counted for each user are those of their held and committed lines.
SELECT format('user %s, product %s', coalesce(u.user_id, l.user_id), coalesce(u.product_id, l.product_id)) AS subject,
       format('%s units counted, lines of %s', coalesce(u.units, 0), coalesce(l.units, 0)) AS found
FROM user_units u FULL JOIN (
    SELECT l.product_id, l.user_id, sum(l.quantity) AS units
    FROM stock s JOIN stock_lines l ON l.product_id = s.product_id AND l.state IN ('h', 'c')
    WHERE s.limit_per_user IS NOT NULL GROUP BY l.product_id, l.user_id
) l ON l.product_id = u.product_id AND l.user_id = u.user_id
WHERE coalesce(u.units, 0) <> coalesce(l.units, 0);
