-- The promises, each as a query that returns only offenders: what, which one, what was found.
-- `orderstream verify`, the tests and the benchmarks all ask these. $1: seconds that a hold may outlive its TTL; $2: the TTL.

-- name: stock adds up
-- initial + received + adjusted = available + reserved + sold
SELECT product_id AS subject, format('initial %s + received %s + adjusted %s, but available %s + reserved %s + sold %s',
       initial, received, adjusted, on_hand - reserved, reserved, sold) AS found
FROM stock WHERE initial + received + adjusted <> (on_hand - reserved) + reserved + sold;

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
    FROM stock_ledger GROUP BY product_id
) g ON g.product_id = s.product_id
WHERE (s.initial, s.received, s.adjusted, s.sold, s.reserved) IS DISTINCT FROM
      (g.initial, g.received, g.adjusted, g.sold, g.reserved);

-- name: held lines explain the reservations
-- And committed lines the sales, with what was sold to orders that were removed since.
SELECT s.product_id AS subject,
       format('reserved %s, held lines %s; sold %s, committed lines %s, carried forward %s', s.reserved,
              coalesce(l.held, 0), s.sold, coalesce(l.committed, 0), coalesce(c.quantity, 0)) AS found
FROM stock s LEFT JOIN (
    SELECT product_id, coalesce(sum(quantity) FILTER (WHERE state = 'held'), 0) AS held,
           coalesce(sum(quantity) FILTER (WHERE state = 'committed'), 0) AS committed
    FROM order_lines GROUP BY product_id
) l ON l.product_id = s.product_id
LEFT JOIN stock_ledger c ON c.product_id = s.product_id AND c.movement = 'carried'
                        AND c.source_id = '00000000-0000-0000-0000-000000000000'
WHERE s.reserved <> coalesce(l.held, 0) OR s.sold <> coalesce(l.committed, 0) + coalesce(c.quantity, 0);

-- name: every order has its lines
SELECT coalesce(o.order_id, l.order_id)::text AS subject, format('%s lines announced, %s there', o.line_count, l.lines) AS found
FROM orders o FULL JOIN (SELECT order_id, count(*) AS lines FROM order_lines GROUP BY order_id) l ON l.order_id = o.order_id
WHERE o.line_count IS DISTINCT FROM l.lines;

-- name: an order is held whole or not at all
-- CONFIRMED: every line committed. PAID: held or committed. RESERVED: held. CANCELLED: none committed, unless it was paid:
-- then its lines return. No other order has a line that returned.
SELECT o.order_id::text AS subject, format('%s, but a line of product %s is %s', o.status, l.product_id, l.state) AS found
FROM orders o JOIN order_lines l ON l.order_id = o.order_id
WHERE (o.status = 'CONFIRMED' AND l.state <> 'committed')
   OR (o.status = 'PAID' AND l.state NOT IN ('held', 'committed'))
   OR (o.status = 'RESERVED' AND l.state <> 'held')
   OR (o.status = 'CANCELLED' AND o.paid_at IS NULL AND l.state IN ('committed', 'returned'))
   OR (o.status = 'CANCELLED' AND o.paid_at IS NOT NULL AND l.state IN ('pending', 'refused'));

-- name: the total is what the lines cost
SELECT o.order_id::text AS subject, format('total %s, lines %s', o.total_cents, sum(l.quantity * l.unit_price_cents)) AS found
FROM orders o JOIN order_lines l ON l.order_id = o.order_id WHERE o.reserved_at IS NOT NULL
GROUP BY o.order_id HAVING o.total_cents IS DISTINCT FROM sum(l.quantity * l.unit_price_cents);

-- name: charges minus refunds are the orders paid for
-- Each order PAID or CONFIRMED has one charge of its total that was not refunded; no other order has one. One that was
-- cancelled after it was paid has a charge of its total that is refunded.
SELECT coalesce(o.order_id, p.order_id)::text AS subject,
       format('order %s over %s, payment %s over %s', o.status, o.total_cents, p.status, p.amount_cents) AS found
FROM orders o FULL JOIN payments p ON p.order_id = o.order_id
WHERE (coalesce(o.status IN ('PAID', 'CONFIRMED'), false) <> coalesce(p.status = 'SUCCESS', false))
   OR (p.status = 'SUCCESS' AND p.amount_cents <> o.total_cents)
   OR (o.status = 'CANCELLED' AND o.paid_at IS NOT NULL
       AND (p.status IN ('REFUND_DUE', 'REFUNDED') AND p.amount_cents = o.total_cents) IS NOT TRUE);

-- name: no hold outlives its time
SELECT order_id::text AS subject, format('%s since %s', status, created_at) AS found FROM orders
WHERE status IN ('CREATED', 'RESERVED') AND created_at < now() - make_interval(secs => $1::float8 + $2::float8);

-- name: no order is paid and forgotten
SELECT order_id::text AS subject, format('PAID since %s', paid_at) AS found FROM orders
WHERE status = 'PAID' AND paid_at < now() - make_interval(secs => $1::float8) AND $2::float8 > 0;

-- name: cancelled orders hold nothing
SELECT o.order_id::text AS subject,
       format('CANCELLED since %s, product %s still %s', o.cancelled_at, l.product_id, l.state) AS found
FROM orders o JOIN order_lines l ON l.order_id = o.order_id
WHERE o.status = 'CANCELLED' AND l.state IN ('held', 'pending', 'committed')
  AND o.cancelled_at < now() - make_interval(secs => $1::float8) AND $2::float8 > 0;

-- name: no user has more than a product's limit
-- Of what was ordered since the limit was set: a user who had more before keeps it.
SELECT format('user %s, product %s', o.user_id, s.product_id) AS subject,
       format('%s units since %s, at most %s', sum(l.quantity), s.limited_since, s.limit_per_user) AS found
FROM stock s
JOIN stock_ledger g ON g.product_id = s.product_id AND g.movement = 'hold' AND g.at >= s.limited_since
JOIN order_lines l ON l.order_id = g.source_id AND l.product_id = g.product_id AND l.state IN ('held', 'committed')
JOIN orders o ON o.order_id = l.order_id
WHERE s.limit_per_user IS NOT NULL
GROUP BY o.user_id, s.product_id, s.limited_since, s.limit_per_user HAVING sum(l.quantity) > s.limit_per_user;

-- name: the lines explain what users have
-- Of products with a limit: units counted for each user are those of their held and committed lines.
SELECT format('user %s, product %s', coalesce(u.user_id, l.user_id), coalesce(u.product_id, l.product_id)) AS subject,
       format('%s units counted, lines of %s', coalesce(u.units, 0), coalesce(l.units, 0)) AS found
FROM user_units u FULL JOIN (
    SELECT l.product_id, o.user_id, sum(l.quantity) AS units
    FROM stock s JOIN order_lines l ON l.product_id = s.product_id JOIN orders o ON o.order_id = l.order_id
    WHERE s.limit_per_user IS NOT NULL AND l.state IN ('held', 'committed') GROUP BY l.product_id, o.user_id
) l ON l.product_id = u.product_id AND l.user_id = u.user_id
WHERE coalesce(u.units, 0) <> coalesce(l.units, 0);
