-- What the stages do to the counts, each a function over arrays: one round trip, one commit, hundreds of lines.
--
-- Locks are taken in one order everywhere: orders by id, order_lines by (order, product), stock by product.
-- Sequential scans are off in them and their plans generic: plans are made while the tables are small and live on while they
-- grow, and one made for a moment's statistics has read a whole index for every batch.
-- A function returns one row of arrays; element n of an "each_" array answers element n of the arguments.

-- Take in orders and decide their lines.
--   orders:  one element a new order record, no id twice.
--   lines:   of these orders and, with line_order_n = 0, lines of orders taken in elsewhere; in the order of arrival.
--   gate:    what Redis said: 1 taken, 0 refused, -1 Redis can't say, 2 not ours to decide, only to note.
--   gate_away: Redis is away, so what it knows about the products changed here becomes void.
CREATE FUNCTION reserve_batch(
    order_ids uuid[], user_ids text[], payment_methods text[], idempotency_keys text[], placed_ats timestamptz[],
    line_counts int[], source_partitions int[], source_offsets bigint[],
    line_order_ns int[], line_order_ids uuid[], line_product_ids text[], line_quantities int[], line_gates int[],
    gate_away boolean,
    OUT at timestamptz,
    OUT each_order_known boolean[],          -- was there before
    OUT each_order_reused boolean[],         -- was there before and is another order: user, method or lines differ
    OUT each_order_created_at timestamptz[],
    OUT each_line_reason text[],             -- null: held, now or before; else why not; 'pending' if not decided here
    OUT each_line_price bigint[],
    OUT each_line_known boolean[],           -- was decided before
    OUT product_ids text[], OUT on_hands bigint[], OUT reserveds bigint[], OUT versions bigint[], OUT generations bigint[]
) LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    wanted    text[];
    current   text := NULL;
    available bigint := 0;
    noted     boolean[];
    twins     int[] := '{}';
    inserted  int;
    expected  int;
    line      record;
BEGIN
    at := now();
    each_order_known := array_fill(false, ARRAY[cardinality(order_ids)]);
    each_order_reused := each_order_known;
    each_order_created_at := array_fill(at, ARRAY[cardinality(order_ids)]);
    each_line_known := array_fill(false, ARRAY[cardinality(line_order_ids)]);
    noted := each_line_known;
    each_line_reason := array_fill('pending'::text, ARRAY[cardinality(line_order_ids)]);
    each_line_price := array_fill(NULL::bigint, ARRAY[cardinality(line_order_ids)]);

    -- Orders that were taken in before: the same record again, or another order under the same id?
    FOR line IN
        SELECT t.n, o.created_at, o.user_id = user_ids[t.n] AND o.payment_method = payment_methods[t.n]
               AND o.line_count = line_counts[t.n] AS same
        FROM unnest(order_ids) WITH ORDINALITY t (id, n) JOIN orders o ON o.order_id = t.id
    LOOP
        each_order_known[line.n] := true;
        each_order_reused[line.n] := NOT line.same;
        each_order_created_at[line.n] := line.created_at;
    END LOOP;

    -- Lines that were noted before, locked in key order; those still pending are decided below.
    FOR line IN
        SELECT t.n, t.order_n, t.quantity = l.quantity AS same, l.state, l.reason, l.unit_price_cents
        FROM order_lines l JOIN unnest(line_order_ns, line_order_ids, line_product_ids, line_quantities) WITH ORDINALITY
             t (order_n, order_id, product_id, quantity, n) ON l.order_id = t.order_id AND l.product_id = t.product_id
        WHERE t.order_n = 0 OR each_order_known[t.order_n]
        ORDER BY l.order_id, l.product_id FOR UPDATE OF l
    LOOP
        noted[line.n] := true;
        IF line.order_n > 0 AND NOT line.same THEN
            each_order_reused[line.order_n] := true;
        END IF;
        IF line.state <> 'pending' THEN
            each_line_known[line.n] := true;
            each_line_reason[line.n] := line.reason;
            each_line_price[line.n] := line.unit_price_cents;
        END IF;
    END LOOP;
    -- A known order that names a product it did not name before is another order as well.
    FOR line IN
        SELECT DISTINCT t.order_n
        FROM unnest(line_order_ns, line_order_ids, line_product_ids) t (order_n, order_id, product_id)
        WHERE t.order_n > 0 AND each_order_known[t.order_n]
          AND NOT EXISTS (SELECT FROM order_lines l WHERE l.order_id = t.order_id AND l.product_id = t.product_id)
    LOOP
        each_order_reused[line.order_n] := true;
    END LOOP;

    -- A line that stands here twice, with its order (sent again, to the owner of another of its products) and handed over
    -- from that order's first record, is decided once: the second one gets the answer of the first.
    IF 0 = ANY (line_order_ns) AND true = ANY (each_order_known) THEN
        FOR line IN
            WITH t AS (SELECT * FROM unnest(line_order_ns, line_order_ids, line_product_ids, line_gates) WITH ORDINALITY
                       u (order_n, order_id, product_id, gate, n))
            SELECT later.n, first.n AS first_n
            FROM t later JOIN t first ON first.order_id = later.order_id AND first.product_id = later.product_id
            WHERE later.order_n = 0 AND first.order_n > 0 AND first.gate <> 2
        LOOP
            IF NOT each_order_reused[line_order_ns[line.first_n]] THEN
                twins[line.n] := line.first_n;
            END IF;
        END LOOP;
    END IF;

    -- Lock what may change. A product of which Redis refused every line is left alone: that is what Redis is for.
    SELECT array_agg(DISTINCT t.product_id) INTO wanted
    FROM unnest(line_product_ids, line_gates) WITH ORDINALITY t (product_id, gate, n)
    WHERE t.gate IN (1, -1);
    PERFORM FROM stock s WHERE s.product_id = ANY (wanted) ORDER BY s.product_id FOR UPDATE;

    -- Decide in the order of arrival, whatever Redis said about the single line: the counts here have the last word.
    FOR line IN
        SELECT t.n, t.product_id, t.quantity, t.order_n, s.on_hand - s.reserved AS available, p.price_cents
        FROM unnest(line_order_ns, line_product_ids, line_quantities, line_gates) WITH ORDINALITY
             t (order_n, product_id, quantity, gate, n)
        LEFT JOIN stock s ON s.product_id = t.product_id AND s.product_id = ANY (wanted)
        LEFT JOIN products p ON p.product_id = s.product_id
        WHERE t.gate <> 2
        ORDER BY t.product_id, t.n
    LOOP
        IF current IS DISTINCT FROM line.product_id THEN
            current := line.product_id;
            available := line.available;
        END IF;
        IF each_line_known[line.n] OR (line.order_n > 0 AND each_order_reused[line.order_n])
           OR (line.order_n = 0 AND NOT noted[line.n]) THEN
            CONTINUE;
        ELSIF twins[line.n] IS NOT NULL THEN
            each_line_known[line.n] := true;
            each_line_reason[line.n] := each_line_reason[twins[line.n]];
            each_line_price[line.n] := each_line_price[twins[line.n]];
        ELSIF line.available IS NULL THEN
            each_line_reason[line.n] := CASE WHEN current = ANY (wanted) THEN 'unknown_product'
                                             ELSE 'insufficient_stock' END;
        ELSIF line.quantity <= available THEN
            available := available - line.quantity;
            each_line_reason[line.n] := NULL;
            each_line_price[line.n] := line.price_cents;
        ELSE
            each_line_reason[line.n] := 'insufficient_stock';
        END IF;
    END LOOP;

    -- Write the orders. One of a single line is decided by that line; one of several is its owner's to decide.
    INSERT INTO orders (order_id, status, reason, line_count, total_cents, source_partition, source_offset, user_id,
                        payment_method, idempotency_key, placed_at, created_at, reserved_at, cancelled_at)
    SELECT o.id,
           CASE WHEN o.line_count > 1 OR l.reason = 'pending' THEN 'CREATED' WHEN l.reason IS NULL THEN 'RESERVED'
                ELSE 'CANCELLED' END::order_status,
           CASE WHEN o.line_count = 1 AND l.reason <> 'pending' THEN l.reason::cancel_reason END,
           o.line_count,
           CASE WHEN o.line_count = 1 AND l.reason IS NULL THEN l.quantity * l.price END,
           o.source_partition, o.source_offset, o.user_id, o.method, o.key, o.placed_at, at,
           CASE WHEN o.line_count = 1 AND l.reason IS NULL THEN at END,
           CASE WHEN o.line_count = 1 AND l.reason <> 'pending' THEN at END
    FROM unnest(order_ids, user_ids, payment_methods, idempotency_keys, placed_ats, line_counts, source_partitions,
                source_offsets, each_order_known) WITH ORDINALITY
         o (id, user_id, method, key, placed_at, line_count, source_partition, source_offset, known, n)
    LEFT JOIN unnest(line_order_ns, line_quantities, each_line_reason, each_line_price)
         l (order_n, quantity, reason, price) ON l.order_n = o.n AND o.line_count = 1
    WHERE NOT o.known
    ORDER BY o.id
    ON CONFLICT (order_id) DO NOTHING;
    GET DIAGNOSTICS inserted = ROW_COUNT;
    SELECT count(*) INTO expected FROM unnest(each_order_known) t (known) WHERE NOT t.known;
    IF inserted <> expected THEN
        -- The partition's former owner, which does not know yet that it is that, took one of them in just now.
        RAISE EXCEPTION 'an order of this batch was taken in by another worker meanwhile' USING ERRCODE = '40001';
    END IF;

    INSERT INTO order_lines (order_id, product_id, quantity, unit_price_cents, state, reason)
    SELECT t.order_id, t.product_id, t.quantity, t.price,
           CASE WHEN t.reason IS NULL THEN 'held' WHEN t.reason = 'pending' THEN 'pending' ELSE 'refused' END::line_state,
           nullif(t.reason, 'pending')::cancel_reason
    FROM unnest(line_order_ns, line_order_ids, line_product_ids, line_quantities, each_line_reason, each_line_price)
         t (order_n, order_id, product_id, quantity, reason, price)
    WHERE t.order_n > 0 AND NOT each_order_known[t.order_n];

    UPDATE order_lines l
    SET state = CASE WHEN t.reason IS NULL THEN 'held' ELSE 'refused' END::line_state,
        reason = t.reason::cancel_reason, unit_price_cents = t.price
    FROM unnest(line_order_ns, line_order_ids, line_product_ids, line_gates, each_line_reason, each_line_price,
                each_line_known) t (order_n, order_id, product_id, gate, reason, price, known)
    WHERE NOT t.known AND t.gate <> 2 AND (t.reason IS NULL OR t.reason <> 'pending')
      AND (t.order_n = 0 OR each_order_known[t.order_n])
      AND l.order_id = t.order_id AND l.product_id = t.product_id AND l.state = 'pending';

    INSERT INTO stock_ledger (product_id, source_id, movement, quantity)
    SELECT t.product_id, t.order_id, 'hold', t.quantity
    FROM unnest(line_order_ids, line_product_ids, line_quantities, each_line_reason, each_line_known)
         t (order_id, product_id, quantity, reason, known)
    WHERE t.reason IS NULL AND NOT t.known;

    WITH changed AS (
        SELECT t.product_id, sum(t.quantity) AS quantity
        FROM unnest(line_product_ids, line_quantities, each_line_reason, each_line_known)
             t (product_id, quantity, reason, known)
        WHERE t.reason IS NULL AND NOT t.known
        GROUP BY t.product_id
    ), held AS (
        UPDATE stock s
        SET reserved = s.reserved + c.quantity, version = s.version + 1,
            gate_generation = s.gate_generation + gate_away::int
        FROM changed c WHERE s.product_id = c.product_id
        RETURNING s.product_id, s.on_hand, s.reserved, s.version, s.gate_generation
    ), counts AS (
        SELECT * FROM held
        UNION ALL
        SELECT s.product_id, s.on_hand, s.reserved, s.version, s.gate_generation
        FROM stock s WHERE s.product_id = ANY (wanted) AND NOT EXISTS (SELECT FROM changed c WHERE c.product_id = s.product_id)
    )
    SELECT coalesce(array_agg(c.product_id), '{}'), array_agg(c.on_hand), array_agg(c.reserved), array_agg(c.version),
           array_agg(c.gate_generation)
    INTO product_ids, on_hands, reserveds, versions, generations FROM counts c;
END $$;


-- Move orders along, as their owner decided. Steps apply in this order, whatever the order of the rows:
--   reserve   all lines of a many-product order are held: CREATED → RESERVED, at this total
--   charged   the provider took the money: RESERVED → PAID; for an order that has ended: a refund is due
--   declined  it did not: RESERVED → CANCELLED
--   cancel    CREATED or RESERVED → CANCELLED, for the reason given
-- A step that does not fit the order's status changes nothing; the answer tells where the order stands.
CREATE FUNCTION decide_batch(
    order_ids uuid[], steps text[], reasons text[], amounts bigint[], charge_ids text[],
    OUT each_status text[],                  -- null: no such order
    OUT each_reason text[],
    OUT each_payment text[],
    OUT each_changed boolean[],              -- by this very row
    OUT each_reserved_at timestamptz[],
    OUT each_moved_at timestamptz[]          -- when it was paid or cancelled
) LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    at   timestamptz := now();
    line record;
BEGIN
    each_changed := array_fill(false, ARRAY[cardinality(order_ids)]);
    PERFORM FROM orders o WHERE o.order_id = ANY (order_ids) ORDER BY o.order_id FOR UPDATE;

    IF 'reserve' = ANY (steps) THEN
        FOR line IN
            WITH t AS (SELECT * FROM unnest(order_ids, steps, amounts) WITH ORDINALITY u (order_id, step, amount, n)
                       WHERE u.step = 'reserve')
            UPDATE orders o SET status = 'RESERVED', reserved_at = at, total_cents = t.amount
            FROM t WHERE o.order_id = t.order_id AND o.status = 'CREATED' RETURNING t.n
        LOOP
            each_changed[line.n] := true;
        END LOOP;
    END IF;

    IF 'charged' = ANY (steps) THEN
        FOR line IN
            WITH t AS (SELECT * FROM unnest(order_ids, steps) WITH ORDINALITY u (order_id, step, n)
                       WHERE u.step = 'charged')
            UPDATE orders o SET status = 'PAID', paid_at = at
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
            WITH t AS (SELECT * FROM unnest(order_ids, steps) WITH ORDINALITY u (order_id, step, n)
                       WHERE u.step = 'declined')
            UPDATE orders o SET status = 'CANCELLED', reason = 'payment_declined', cancelled_at = at
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
            WITH t AS (SELECT DISTINCT ON (u.order_id) * FROM unnest(order_ids, steps, reasons) WITH ORDINALITY
                       u (order_id, step, reason, n) WHERE u.step = 'cancel' ORDER BY u.order_id, u.n)
            UPDATE orders o SET status = 'CANCELLED', reason = t.reason::cancel_reason, cancelled_at = at
            FROM t WHERE o.order_id = t.order_id AND o.status IN ('CREATED', 'RESERVED') RETURNING t.n
        LOOP
            each_changed[line.n] := true;
        END LOOP;
    END IF;

    SELECT array_agg(o.status::text ORDER BY t.n), array_agg(o.reason::text ORDER BY t.n),
           array_agg(p.status::text ORDER BY t.n), array_agg(o.reserved_at ORDER BY t.n),
           array_agg(coalesce(o.cancelled_at, o.paid_at) ORDER BY t.n)
    INTO each_status, each_reason, each_payment, each_reserved_at, each_moved_at
    FROM unnest(order_ids) WITH ORDINALITY t (order_id, n)
    LEFT JOIN orders o ON o.order_id = t.order_id LEFT JOIN payments p ON p.order_id = t.order_id;
END $$;


-- Note that these due refunds were made. Answers which of them were due until now.
CREATE FUNCTION refunded_batch(order_ids uuid[], OUT refunded uuid[]) LANGUAGE sql AS $$
    WITH due AS (
        SELECT p.order_id FROM payments p WHERE p.order_id = ANY (order_ids) AND p.status = 'REFUND_DUE'
        ORDER BY p.order_id FOR UPDATE
    ), done AS (
        UPDATE payments p SET status = 'REFUNDED', refunded_at = now() FROM due WHERE p.order_id = due.order_id
        RETURNING p.order_id
    )
    SELECT coalesce(array_agg(order_id), '{}') FROM done
$$;


-- Commit or release held lines, and confirm the orders whose last line this commits.
-- A line that is not held any more was settled before. One whose order does not agree (a commit without payment, a
-- release without cancellation) stays as it is, and its order is answered in `misfits`.
CREATE FUNCTION settle_batch(
    order_ids uuid[], line_product_ids text[], actions text[], gate_away boolean,
    OUT at timestamptz,
    OUT confirmed_ids uuid[], OUT confirmed_ats timestamptz[],   -- of all these orders, also those confirmed before
    OUT misfits uuid[],
    OUT settled int,
    OUT product_ids text[], OUT on_hands bigint[], OUT reserveds bigint[], OUT versions bigint[], OUT generations bigint[],
    OUT solds bigint[]
) LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    s_orders     uuid[];
    s_products   text[];
    s_quantities int[];
    s_commits    boolean[];
BEGIN
    at := now();
    PERFORM FROM orders o WHERE o.order_id = ANY (order_ids) ORDER BY o.order_id FOR UPDATE;

    SELECT array_agg(DISTINCT o.order_id) INTO misfits
    FROM unnest(order_ids, actions) t (order_id, action) JOIN orders o ON o.order_id = t.order_id
    WHERE NOT ((t.action = 'commit' AND o.status IN ('PAID', 'CONFIRMED'))
               OR (t.action = 'release' AND o.status = 'CANCELLED'));

    SELECT array_agg(x.order_id), array_agg(x.product_id), array_agg(x.quantity), array_agg(x.action = 'commit')
    INTO s_orders, s_products, s_quantities, s_commits
    FROM (
        SELECT l.order_id, l.product_id, l.quantity, t.action
        FROM order_lines l
        JOIN unnest(order_ids, line_product_ids, actions) t (order_id, product_id, action)
             ON l.order_id = t.order_id AND l.product_id = t.product_id
        JOIN orders o ON o.order_id = l.order_id
        WHERE l.state = 'held' AND ((t.action = 'commit' AND o.status IN ('PAID', 'CONFIRMED'))
                                    OR (t.action = 'release' AND o.status = 'CANCELLED'))
        ORDER BY l.order_id, l.product_id FOR UPDATE OF l
    ) x;
    settled := coalesce(cardinality(s_orders), 0);

    PERFORM FROM stock s WHERE s.product_id = ANY (s_products) ORDER BY s.product_id FOR UPDATE;

    IF settled > 0 THEN
        UPDATE order_lines l SET state = CASE WHEN t.commits THEN 'committed' ELSE 'released' END::line_state
        FROM unnest(s_orders, s_products, s_commits) t (order_id, product_id, commits)
        WHERE l.order_id = t.order_id AND l.product_id = t.product_id;

        INSERT INTO stock_ledger (product_id, source_id, movement, quantity)
        SELECT t.product_id, t.order_id, CASE WHEN t.commits THEN 'commit' ELSE 'release' END::movement, t.quantity
        FROM unnest(s_orders, s_products, s_quantities, s_commits) t (order_id, product_id, quantity, commits);

        UPDATE orders o
        SET lines_committed = o.lines_committed + t.lines,
            status = CASE WHEN o.lines_committed + t.lines = o.line_count THEN 'CONFIRMED' ELSE o.status END,
            confirmed_at = CASE WHEN o.lines_committed + t.lines = o.line_count THEN at END
        FROM (SELECT u.order_id, count(*)::int AS lines FROM unnest(s_orders, s_commits) u (order_id, commits)
              WHERE u.commits GROUP BY u.order_id) t
        WHERE o.order_id = t.order_id;
    END IF;

    WITH moved AS (
        SELECT t.product_id, sum(t.quantity) AS quantity, coalesce(sum(t.quantity) FILTER (WHERE t.commits), 0) AS sold
        FROM unnest(s_products, s_quantities, s_commits) t (product_id, quantity, commits) GROUP BY t.product_id
    ), counts AS (
        UPDATE stock s
        SET on_hand = s.on_hand - m.sold, reserved = s.reserved - m.quantity, sold = s.sold + m.sold,
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
END $$;


-- Receive or adjust stock. Commands apply one after the other; a repeated command_id changes nothing.
CREATE FUNCTION stock_batch(
    command_ids uuid[], command_product_ids text[], commands text[], quantities bigint[], reasons text[],
    gate_away boolean,
    OUT each_outcome text[],                 -- applied, known, unknown_product, insufficient_stock
    OUT product_ids text[], OUT on_hands bigint[], OUT reserveds bigint[], OUT versions bigint[], OUT generations bigint[],
    OUT solds bigint[]
) LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    c record;
BEGIN
    each_outcome := array_fill('known'::text, ARRAY[cardinality(command_ids)]);
    PERFORM FROM stock s WHERE s.product_id = ANY (command_product_ids) ORDER BY s.product_id FOR UPDATE;
    FOR c IN
        SELECT t.*, s.product_id IS NOT NULL AS found
        FROM unnest(command_ids, command_product_ids, commands, quantities, reasons) WITH ORDINALITY
             t (command_id, product_id, command, quantity, reason, n)
        LEFT JOIN stock s ON s.product_id = t.product_id ORDER BY t.n
    LOOP
        IF NOT c.found THEN
            each_outcome[c.n] := 'unknown_product';
        ELSIF EXISTS (SELECT FROM stock_ledger g WHERE g.source_id = c.command_id AND g.movement IN ('receive', 'adjust')) THEN
            CONTINUE;
        ELSIF c.quantity < 0 AND EXISTS (SELECT FROM stock s WHERE s.product_id = c.product_id
                                         AND s.on_hand - s.reserved + c.quantity < 0) THEN
            each_outcome[c.n] := 'insufficient_stock';
        ELSE
            INSERT INTO stock_ledger (product_id, source_id, movement, quantity, reason)
            VALUES (c.product_id, c.command_id, c.command::movement, c.quantity, nullif(c.reason, ''));
            UPDATE stock s
            SET on_hand = s.on_hand + c.quantity,
                received = s.received + CASE WHEN c.command = 'receive' THEN c.quantity ELSE 0 END,
                adjusted = s.adjusted + CASE WHEN c.command = 'adjust' THEN c.quantity ELSE 0 END,
                version = s.version + 1, gate_generation = s.gate_generation + gate_away::int
            WHERE s.product_id = c.product_id;
            each_outcome[c.n] := 'applied';
        END IF;
    END LOOP;
    SELECT coalesce(array_agg(s.product_id), '{}'), array_agg(s.on_hand), array_agg(s.reserved), array_agg(s.version),
           array_agg(s.gate_generation), array_agg(s.sold)
    INTO product_ids, on_hands, reserveds, versions, generations, solds
    FROM stock s WHERE s.product_id = ANY (command_product_ids);
END $$;


-- Load products with their first stock. Those that are there already stay as they are. Answers how many were new.
CREATE FUNCTION load_catalogue(ids text[], names text[], prices bigint[], quantities bigint[]) RETURNS bigint
LANGUAGE sql AS $$
    WITH fresh AS (
        INSERT INTO products (product_id, name, price_cents)
        SELECT t.id, t.name, t.price FROM unnest(ids, names, prices) t (id, name, price) ORDER BY t.id
        ON CONFLICT DO NOTHING RETURNING product_id
    ), units AS (
        SELECT t.id, t.quantity FROM unnest(ids, quantities) t (id, quantity) JOIN fresh f ON f.product_id = t.id
    ), counts AS (
        INSERT INTO stock (product_id, on_hand, initial) SELECT u.id, u.quantity, u.quantity FROM units u
    ), entries AS (
        INSERT INTO stock_ledger (product_id, source_id, movement, quantity)
        SELECT u.id, gen_random_uuid(), 'initial', u.quantity FROM units u
    )
    SELECT count(*) FROM fresh
$$;
