-- A customer may cancel an order that is paid or confirmed: its charge is given back, its units return to stock.
-- And each order keeps, in its own row, which record caused each of its statuses.

ALTER TYPE line_state ADD VALUE 'returned';        -- was held or committed for a paid order that was cancelled
ALTER TYPE movement ADD VALUE 'return';            -- sold units that are in the house again

-- A cancelled order keeps the times at which it was paid and confirmed: paid_at tells that units and charge go back.
ALTER TABLE orders
    DROP CONSTRAINT orders_status_times,
    DROP CONSTRAINT orders_confirmed_whole,
    ADD CONSTRAINT orders_status_times CHECK (CASE status
        WHEN 'CREATED'   THEN reserved_at IS NULL AND paid_at IS NULL AND confirmed_at IS NULL AND cancelled_at IS NULL
        WHEN 'RESERVED'  THEN reserved_at IS NOT NULL AND paid_at IS NULL AND confirmed_at IS NULL AND cancelled_at IS NULL
        WHEN 'PAID'      THEN paid_at IS NOT NULL AND confirmed_at IS NULL AND cancelled_at IS NULL
        WHEN 'CONFIRMED' THEN paid_at IS NOT NULL AND confirmed_at IS NOT NULL AND cancelled_at IS NULL
        WHEN 'CANCELLED' THEN cancelled_at IS NOT NULL AND (confirmed_at IS NULL OR paid_at IS NOT NULL) END),
    ADD CONSTRAINT orders_confirmed_whole CHECK
        (status = 'CANCELLED' OR (status = 'CONFIRMED') = (lines_committed = line_count)),
    ADD CONSTRAINT orders_paid_cancelled CHECK
        (status <> 'CANCELLED' OR paid_at IS NULL OR reason = 'cancelled_by_user');

-- Where the records stand that moved the order.  The partitions of `reservations` and `order-commands` follow from its id.
ALTER TABLE orders
    ADD COLUMN reservation_offset   bigint,        -- the verdict that completed it: RESERVED of many products, PAID, refused
    ADD COLUMN settlement_partition int,           -- the settlement of its last line: CONFIRMED
    ADD COLUMN settlement_offset    bigint,
    ADD COLUMN command_offset       bigint;        -- the command that ended it


-- Move orders along, as their owner decided. Steps apply in this order, whatever the order of the rows:
--   reserve   all lines of a many-product order are held: CREATED → RESERVED, at this total
--   charged   the provider took the money: RESERVED → PAID; for an order that has ended: a refund is due
--   declined  it did not: RESERVED → CANCELLED
--   cancel    CREATED or RESERVED → CANCELLED, for the reason given
--   revoke    its customer cancels it: CREATED, RESERVED, PAID or CONFIRMED → CANCELLED; of a charge a refund is due
-- A step that does not fit the order's status changes nothing; the answer tells where the order stands.
-- source_offsets: where the record stands that the step follows from, on `reservations`, or on `order-commands` for a
-- revoke and an expiry.
DROP FUNCTION decide_batch(uuid[], text[], text[], bigint[], text[]);
CREATE FUNCTION decide_batch(
    order_ids uuid[], steps text[], reasons text[], amounts bigint[], charge_ids text[], source_offsets bigint[],
    OUT each_status text[],                  -- null: no such order
    OUT each_reason text[],
    OUT each_payment text[],
    OUT each_changed boolean[],              -- by this very row
    OUT each_reserved_at timestamptz[],
    OUT each_moved_at timestamptz[],         -- when it was paid, or else cancelled
    OUT each_revoked boolean[]               -- it was paid before it was cancelled
) LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    at   timestamptz := now();
    line record;
BEGIN
    each_changed := array_fill(false, ARRAY[cardinality(order_ids)]);
    PERFORM FROM orders o WHERE o.order_id = ANY (order_ids) ORDER BY o.order_id FOR UPDATE;

    IF 'reserve' = ANY (steps) THEN
        FOR line IN
            WITH t AS (SELECT * FROM unnest(order_ids, steps, amounts, source_offsets) WITH ORDINALITY
                       u (order_id, step, amount, source_offset, n) WHERE u.step = 'reserve')
            UPDATE orders o SET status = 'RESERVED', reserved_at = at, total_cents = t.amount,
                                reservation_offset = t.source_offset
            FROM t WHERE o.order_id = t.order_id AND o.status = 'CREATED' RETURNING t.n
        LOOP
            each_changed[line.n] := true;
        END LOOP;
    END IF;

    IF 'charged' = ANY (steps) THEN
        FOR line IN
            WITH t AS (SELECT * FROM unnest(order_ids, steps, source_offsets) WITH ORDINALITY
                       u (order_id, step, source_offset, n) WHERE u.step = 'charged')
            UPDATE orders o SET status = 'PAID', paid_at = at,
                                reservation_offset = coalesce(t.source_offset, o.reservation_offset)
            FROM t WHERE o.order_id = t.order_id AND o.status = 'RESERVED' RETURNING t.n
        LOOP
            each_changed[line.n] := true;
        END LOOP;
        INSERT INTO payments (order_id, status, amount_cents, charge_id)
        SELECT o.order_id, CASE WHEN o.status = 'CANCELLED' THEN 'REFUND_DUE' ELSE 'SUCCESS' END::payment_status,
               t.amount, t.charge_id
        FROM unnest(order_ids, steps, amounts, charge_ids) t (order_id, step, amount, charge_id)
        JOIN orders o ON o.order_id = t.order_id
        WHERE t.step = 'charged'
        ON CONFLICT (order_id) DO NOTHING;
    END IF;

    IF 'declined' = ANY (steps) THEN
        FOR line IN
            WITH t AS (SELECT * FROM unnest(order_ids, steps, source_offsets) WITH ORDINALITY
                       u (order_id, step, source_offset, n) WHERE u.step = 'declined')
            UPDATE orders o SET status = 'CANCELLED', reason = 'payment_declined', cancelled_at = at,
                                reservation_offset = t.source_offset
            FROM t WHERE o.order_id = t.order_id AND o.status = 'RESERVED' RETURNING t.n
        LOOP
            each_changed[line.n] := true;
        END LOOP;
        INSERT INTO payments (order_id, status, amount_cents)
        SELECT t.order_id, 'FAILED', t.amount
        FROM unnest(order_ids, steps, amounts) t (order_id, step, amount) JOIN orders o ON o.order_id = t.order_id
        WHERE t.step = 'declined' AND o.status = 'CANCELLED'
        ON CONFLICT (order_id) DO NOTHING;
    END IF;

    IF 'cancel' = ANY (steps) THEN
        FOR line IN
            WITH t AS (SELECT DISTINCT ON (u.order_id) * FROM unnest(order_ids, steps, reasons, source_offsets)
                       WITH ORDINALITY u (order_id, step, reason, source_offset, n)
                       WHERE u.step = 'cancel' ORDER BY u.order_id, u.n)
            UPDATE orders o
            SET status = 'CANCELLED', reason = t.reason::cancel_reason, cancelled_at = at,
                command_offset = CASE WHEN t.reason IN ('expired', 'cancelled_by_user') THEN t.source_offset END,
                reservation_offset = CASE WHEN t.reason IN ('expired', 'cancelled_by_user') THEN o.reservation_offset
                                          ELSE t.source_offset END
            FROM t WHERE o.order_id = t.order_id AND o.status IN ('CREATED', 'RESERVED') RETURNING t.n
        LOOP
            each_changed[line.n] := true;
        END LOOP;
    END IF;

    IF 'revoke' = ANY (steps) THEN
        FOR line IN
            WITH t AS (SELECT DISTINCT ON (u.order_id) * FROM unnest(order_ids, steps, source_offsets) WITH ORDINALITY
                       u (order_id, step, source_offset, n) WHERE u.step = 'revoke' ORDER BY u.order_id, u.n)
            UPDATE orders o SET status = 'CANCELLED', reason = 'cancelled_by_user', cancelled_at = at,
                                command_offset = t.source_offset
            FROM t WHERE o.order_id = t.order_id AND o.status <> 'CANCELLED' RETURNING t.n
        LOOP
            each_changed[line.n] := true;
        END LOOP;
        UPDATE payments p SET status = 'REFUND_DUE'
        FROM unnest(order_ids, steps) t (order_id, step)
        WHERE t.step = 'revoke' AND p.order_id = t.order_id AND p.status = 'SUCCESS';
    END IF;

    SELECT array_agg(o.status::text ORDER BY t.n), array_agg(o.reason::text ORDER BY t.n),
           array_agg(p.status::text ORDER BY t.n), array_agg(o.reserved_at ORDER BY t.n),
           array_agg(coalesce(o.paid_at, o.cancelled_at) ORDER BY t.n),
           array_agg(coalesce(o.status = 'CANCELLED' AND o.paid_at IS NOT NULL, false) ORDER BY t.n)
    INTO each_status, each_reason, each_payment, each_reserved_at, each_moved_at, each_revoked
    FROM unnest(order_ids) WITH ORDINALITY t (order_id, n)
    LEFT JOIN orders o ON o.order_id = t.order_id LEFT JOIN payments p ON p.order_id = t.order_id;
END $$;


-- Commit, release or return lines, and confirm the orders whose last line this commits.
--   commit   a held line of an order that is paid is sold
--   release  a held line of an order that ended without being paid is free again
--   return   a line of an order that was cancelled after it was paid: what is sold comes back, what is held is free again
-- A line in another state was settled before. One whose order does not agree (a commit without payment, a release without
-- cancellation) stays as it is, and its order is answered in `misfits`. Of an order that was paid and then cancelled only a
-- return counts: its commits may still be under way, and are no misfits.
DROP FUNCTION settle_batch(uuid[], text[], text[], boolean);
CREATE FUNCTION settle_batch(
    order_ids uuid[], line_product_ids text[], actions text[], source_partitions int[], source_offsets bigint[],
    gate_away boolean,
    OUT at timestamptz,
    OUT confirmed_ids uuid[], OUT confirmed_ats timestamptz[],   -- of all these orders, also those confirmed before
    OUT returned_ids uuid[], OUT returned_ats timestamptz[],     -- those of which a line is to return and none is left to
    OUT misfits uuid[],
    OUT settled int,
    OUT product_ids text[], OUT on_hands bigint[], OUT reserveds bigint[], OUT versions bigint[], OUT generations bigint[],
    OUT solds bigint[]
) LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    s_orders     uuid[];
    s_products   text[];
    s_quantities int[];
    s_moves      text[];
    s_places     bigint[];                   -- partition << 40 | offset, of the settlement's record
BEGIN
    at := now();
    PERFORM FROM orders o WHERE o.order_id = ANY (order_ids) ORDER BY o.order_id FOR UPDATE;

    SELECT array_agg(DISTINCT o.order_id) INTO misfits
    FROM unnest(order_ids, actions) t (order_id, action) JOIN orders o ON o.order_id = t.order_id
    WHERE NOT ((t.action = 'commit' AND o.status IN ('PAID', 'CONFIRMED'))
               OR (t.action = 'release' AND o.status = 'CANCELLED')
               OR (o.status = 'CANCELLED' AND o.paid_at IS NOT NULL));

    SELECT array_agg(x.order_id), array_agg(x.product_id), array_agg(x.quantity), array_agg(x.move), array_agg(x.place)
    INTO s_orders, s_products, s_quantities, s_moves, s_places
    FROM (
        SELECT l.order_id, l.product_id, l.quantity, (t.partition::bigint << 40) | t.source_offset AS place,
               CASE WHEN t.action = 'return' AND l.state = 'held' THEN 'release' ELSE t.action END AS move
        FROM order_lines l
        JOIN unnest(order_ids, line_product_ids, actions, source_partitions, source_offsets)
             t (order_id, product_id, action, partition, source_offset)
             ON l.order_id = t.order_id AND l.product_id = t.product_id
        JOIN orders o ON o.order_id = l.order_id
        WHERE (l.state = 'held' AND ((t.action = 'commit' AND o.status IN ('PAID', 'CONFIRMED'))
                                     OR (t.action = 'release' AND o.status = 'CANCELLED' AND o.paid_at IS NULL)))
           OR (t.action = 'return' AND l.state IN ('held', 'committed') AND o.status = 'CANCELLED'
               AND o.paid_at IS NOT NULL)
        ORDER BY l.order_id, l.product_id FOR UPDATE OF l
    ) x;
    settled := coalesce(cardinality(s_orders), 0);

    PERFORM FROM stock s WHERE s.product_id = ANY (s_products) ORDER BY s.product_id FOR UPDATE;

    IF settled > 0 THEN
        UPDATE order_lines l
        SET state = CASE t.move WHEN 'commit' THEN 'committed' WHEN 'release' THEN 'released' ELSE 'returned' END::line_state
        FROM unnest(s_orders, s_products, s_moves) t (order_id, product_id, move)
        WHERE l.order_id = t.order_id AND l.product_id = t.product_id;

        INSERT INTO stock_ledger (product_id, source_id, movement, quantity)
        SELECT t.product_id, t.order_id, t.move::movement, t.quantity
        FROM unnest(s_orders, s_products, s_quantities, s_moves) t (order_id, product_id, quantity, move);

        UPDATE orders o
        SET lines_committed = o.lines_committed + t.lines,
            status = CASE WHEN o.lines_committed + t.lines = o.line_count THEN 'CONFIRMED' ELSE o.status END,
            confirmed_at = CASE WHEN o.lines_committed + t.lines = o.line_count THEN at END,
            settlement_partition = t.place >> 40, settlement_offset = t.place & ((1::bigint << 40) - 1)
        FROM (SELECT u.order_id, count(*)::int AS lines, max(u.place) AS place
              FROM unnest(s_orders, s_moves, s_places) u (order_id, move, place)
              WHERE u.move = 'commit' GROUP BY u.order_id) t
        WHERE o.order_id = t.order_id;

        IF 'return' = ANY (s_moves) THEN
            UPDATE orders o SET lines_committed = o.lines_committed - t.lines
            FROM (SELECT u.order_id, count(*)::int AS lines FROM unnest(s_orders, s_moves) u (order_id, move)
                  WHERE u.move = 'return' GROUP BY u.order_id) t
            WHERE o.order_id = t.order_id;
        END IF;
    END IF;

    WITH moved AS (
        SELECT t.product_id,
               coalesce(sum(t.quantity) FILTER (WHERE t.move <> 'return'), 0) AS unreserved,
               coalesce(sum(t.quantity) FILTER (WHERE t.move = 'commit'), 0)
                 - coalesce(sum(t.quantity) FILTER (WHERE t.move = 'return'), 0) AS sold
        FROM unnest(s_products, s_quantities, s_moves) t (product_id, quantity, move) GROUP BY t.product_id
    ), counts AS (
        UPDATE stock s
        SET on_hand = s.on_hand - m.sold, reserved = s.reserved - m.unreserved, sold = s.sold + m.sold,
            version = s.version + 1, gate_generation = s.gate_generation + gate_away::int
        FROM moved m WHERE s.product_id = m.product_id
        RETURNING s.product_id, s.on_hand, s.reserved, s.version, s.gate_generation, s.sold
    ), untouched AS (  -- settled before, perhaps without Redis having heard of it
        SELECT s.product_id, s.on_hand, s.reserved, s.version, s.gate_generation, s.sold
        FROM stock s WHERE s.product_id = ANY (line_product_ids)
          AND s.product_id <> ALL (coalesce(s_products, '{}'))
    ), all_counts AS (SELECT * FROM counts UNION ALL SELECT * FROM untouched)
    SELECT coalesce(array_agg(c.product_id), '{}'), array_agg(c.on_hand), array_agg(c.reserved), array_agg(c.version),
           array_agg(c.gate_generation), array_agg(c.sold)
    INTO product_ids, on_hands, reserveds, versions, generations, solds FROM all_counts c;

    SELECT coalesce(array_agg(o.order_id), '{}'), array_agg(o.confirmed_at) INTO confirmed_ids, confirmed_ats
    FROM orders o WHERE o.order_id = ANY (order_ids) AND o.status = 'CONFIRMED';

    IF 'return' = ANY (actions) THEN
        SELECT array_agg(o.order_id), array_agg(o.cancelled_at) INTO returned_ids, returned_ats
        FROM orders o
        WHERE o.order_id IN (SELECT t.order_id FROM unnest(order_ids, actions) t (order_id, action) WHERE t.action = 'return')
          AND o.status = 'CANCELLED' AND o.paid_at IS NOT NULL
          AND NOT EXISTS (SELECT FROM order_lines l WHERE l.order_id = o.order_id AND l.state IN ('held', 'committed'));
    END IF;
END $$;
