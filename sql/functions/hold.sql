-- reserve: orders of a home are taken in with their lines decided, and what they hold is counted.

-- Take in orders whose lines are decided: by Redis, or by their owner under the locks of the stock (lock_stock).
--   orders       one element each, no id twice, sorted by id.
--   line_*       their lines in the order of the orders; `line_ns`: which order, from 1.
--   line_states  h held now · x refused · a another owner's to decide · r not held, since another line was refused.
--   line_owners  partitions of the lines' products, of orders with lines of other owners. Such a line in state h is of a partition
--                of this transaction; its hold is written with it.
--   held_*       the lines in state h once more: what is counted.
-- Short forms, since reading arrays is a third of the work: one element of `homes`, `payment_methods`, `statuses` or
-- `line_states` stands for all; a column of nulls is empty; without `line_ns` each order has one line, and held_* are null
-- where all of these are held.
--   payments: VOID_DUE of orders that are refused and may have been charged before Postgres was set back.
-- Where an order is known, or was removed, nothing is written and `known` has the ids: take these out and call again.
-- Raises OS001 (begin_step); 23514, a CHECK, where there are fewer units than these lines hold, OS004 where there is no such
-- product or it is retired, 23505 (holds_once) where an owner has a row of such a line already, and OS002 where a user would have
-- more than a product's limit: then decide under the locks and call again.
-- Waits where another home takes in one of these ids at this moment, and raises 23505 if it does: then call again.
CREATE FUNCTION hold(
    partitions int[], claims bigint[], sequences bigint[], attempt uuid,
    mark_partitions int[], mark_topics text[], mark_nexts bigint[], mark_acknowledged bigint[], mark_stamps bigint[],
    mark_digests bigint[],
    order_ids uuid[], homes int[], source_offsets bigint[], user_ids text[], payment_methods text[],
    idempotency_keys text[], placed_ats timestamptz[], statuses order_status[], cancel_reasons cancel_reason[],
    payments payment[],
    line_ns int[], line_product_ids text[], line_quantities int[], line_states "char"[], line_reasons cancel_reason[],
    line_owners int[],
    held_order_ids uuid[], held_product_ids text[], held_user_ids text[], held_quantities int[],
    OUT at timestamptz,
    OUT known text[],
    OUT totals bigint[],                     -- of each order, in the order of `order_ids`; null: it is not RESERVED
    OUT prices_of text[],                    -- of the lines of each that has several and is RESERVED: JSON; null: of none
    OUT product_ids text[], OUT on_hands bigint[], OUT reserveds bigint[], OUT versions bigint[], OUT generations bigint[],
    OUT solds bigint[],
    OUT limited_ids text[], OUT limited_users text[], OUT limited_units bigint[],  -- of limited products: who has how many
    OUT kept_ids text[], OUT kept_partitions int[], OUT kept_offsets bigint[]      -- cancels that came before their order
) LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE  -- where a column has one element
    every_home   int          := homes[1];
    every_status order_status := statuses[1];
    every_payment payment     := CASE WHEN cardinality(payments) = 1 THEN payments[1] END;
    every_method text         := payment_methods[1];
    every_state  "char"       := line_states[1];
    any_limited boolean;
    any_retired boolean;
BEGIN
    at := now();
    SELECT array_agg(k.order_id::text) INTO known
    FROM (SELECT o.order_id FROM orders o WHERE o.order_id = ANY (order_ids)
          UNION ALL SELECT r.order_id FROM removed_orders r WHERE r.order_id = ANY (order_ids)) k;
    IF known IS NOT NULL THEN
        RETURN;
    END IF;
    PERFORM begin_step('intake', partitions, claims, sequences, attempt,
                       mark_partitions, mark_topics, mark_nexts, mark_acknowledged, mark_stamps, mark_digests, homes);

    IF cardinality(line_ns) = 0 THEN
        WITH written AS (
            INSERT INTO orders AS o (order_id, home, source_offset, status, reason, user_id, payment_method, idempotency_key,
                                     placed_at, product_ids, quantities, prices, states, reasons, owners, total_cents,
                                     payment, created_at, reserved_at, cancelled_at)
            SELECT t.order_id, coalesce(t.home, every_home), t.source_offset, coalesce(t.status, every_status), t.reason,
                   t.user_id, coalesce(t.payment_method, every_method), t.idempotency_key, t.placed_at,
                   ARRAY[t.product_id], ARRAY[t.quantity],
                   ARRAY[CASE WHEN coalesce(t.state, every_state) = 'h' THEN s.price_cents END],
                   ARRAY[coalesce(t.state, every_state)], CASE WHEN t.line_reason IS NOT NULL THEN ARRAY[t.line_reason] END,
                   CASE WHEN t.owner IS NOT NULL THEN ARRAY[t.owner] END,
                   CASE WHEN coalesce(t.status, every_status) = 'RESERVED' THEN t.quantity * s.price_cents END,
                   coalesce(t.payment, every_payment), at,
                   CASE WHEN coalesce(t.status, every_status) = 'RESERVED' THEN at END,
                   CASE WHEN coalesce(t.status, every_status) = 'CANCELLED' THEN at END
            FROM unnest(order_ids, homes, source_offsets, statuses, cancel_reasons, payments, user_ids, payment_methods,
                        idempotency_keys, placed_ats, line_product_ids, line_quantities, line_states, line_reasons,
                        line_owners) WITH ORDINALITY
                 t (order_id, home, source_offset, status, reason, payment, user_id, payment_method, idempotency_key, placed_at,
                    product_id, quantity, state, line_reason, owner, n)
            LEFT JOIN stock s ON s.product_id = t.product_id ORDER BY t.n
            RETURNING o.total_cents
        )
        SELECT array_agg(w.total_cents) INTO totals FROM written w;
    ELSE
        WITH whole AS (
            SELECT l.n, array_agg(l.product_id ORDER BY l.i) AS product_ids,
                   array_agg(l.quantity ORDER BY l.i) AS quantities,
                   array_agg(CASE WHEN coalesce(l.state, every_state) = 'h' THEN s.price_cents END ORDER BY l.i)
                       AS prices,
                   array_agg(coalesce(l.state, every_state) ORDER BY l.i) AS states,
                   CASE WHEN count(l.reason) > 0 THEN array_agg(l.reason ORDER BY l.i) END AS reasons,
                   CASE WHEN count(l.owner) > 0 THEN array_agg(l.owner ORDER BY l.i) END AS owners,
                   sum(CASE WHEN coalesce(l.state, every_state) = 'h' THEN l.quantity * s.price_cents END)::bigint
                       AS total
            FROM unnest(line_ns, line_product_ids, line_quantities, line_states, line_reasons, line_owners) WITH ORDINALITY
                 l (n, product_id, quantity, state, reason, owner, i)
            LEFT JOIN stock s ON s.product_id = l.product_id
            GROUP BY l.n
        ), written AS (
            INSERT INTO orders AS o (order_id, home, source_offset, status, reason, user_id, payment_method, idempotency_key,
                                     placed_at, product_ids, quantities, prices, states, reasons, owners, total_cents,
                                     payment, created_at, reserved_at, cancelled_at)
            SELECT t.order_id, coalesce(t.home, every_home), t.source_offset, coalesce(t.status, every_status), t.reason,
                   t.user_id, coalesce(t.payment_method, every_method), t.idempotency_key, t.placed_at,
                   w.product_ids, w.quantities, w.prices, w.states, w.reasons, w.owners,
                   CASE WHEN coalesce(t.status, every_status) = 'RESERVED' THEN w.total END,
                   coalesce(t.payment, every_payment), at,
                   CASE WHEN coalesce(t.status, every_status) = 'RESERVED' THEN at END,
                   CASE WHEN coalesce(t.status, every_status) = 'CANCELLED' THEN at END
            FROM unnest(order_ids, homes, source_offsets, statuses, cancel_reasons, payments, user_ids, payment_methods,
                        idempotency_keys, placed_ats) WITH ORDINALITY
                 t (order_id, home, source_offset, status, reason, payment, user_id, payment_method, idempotency_key,
                  placed_at, n)
            JOIN whole w ON w.n = t.n ORDER BY t.n
            RETURNING o.total_cents, CASE WHEN o.total_cents IS NOT NULL AND cardinality(o.prices) > 1
                                          THEN array_to_json(o.prices)::text END AS prices_of
        )
        SELECT array_agg(w.total_cents), array_agg(w.prices_of) INTO totals, prices_of FROM written w;
    END IF;

    IF cardinality(line_owners) > 0 THEN
        INSERT INTO holds (partition, order_id, product_id, home, user_id, quantity, price, state, held_at)
        SELECT l.owner, t.order_id, l.product_id, coalesce(t.home, every_home), t.user_id, l.quantity,
               o.prices[array_position(o.product_ids, l.product_id)],  -- as the order has it: the product's may be another by now
               'h', at
        FROM unnest(line_ns, line_product_ids, line_quantities, line_states, line_owners) l (n, product_id, quantity, state, owner)
        JOIN unnest(order_ids, homes, user_ids) WITH ORDINALITY t (order_id, home, user_id, n) ON t.n = l.n
        JOIN orders o ON o.order_id = t.order_id
        WHERE coalesce(l.state, every_state) = 'h' AND l.owner <> coalesce(t.home, every_home)
        ORDER BY t.order_id, l.product_id;
    END IF;

    IF held_order_ids IS NULL THEN
        held_order_ids := order_ids;
        held_product_ids := line_product_ids;
        held_user_ids := user_ids;
        held_quantities := line_quantities;
    END IF;
    IF cardinality(held_order_ids) > 0 THEN
        SELECT * INTO product_ids, on_hands, reserveds, versions, generations, solds
        FROM move_stock('intake', partitions, ARRAY['hold'::movement],
                        held_order_ids, held_product_ids, held_quantities);
        SELECT coalesce(bool_or(s.limit_per_user IS NOT NULL), false), coalesce(bool_or(s.retired), false)
        INTO any_limited, any_retired FROM stock s WHERE s.product_id = ANY (product_ids);
        IF any_retired THEN  -- since Redis was asked
            RAISE EXCEPTION 'units of a product that is retired' USING ERRCODE = 'OS004';
        END IF;
        IF any_limited THEN
            SELECT * INTO limited_ids, limited_users, limited_units
            FROM count_users(held_product_ids, held_user_ids, held_quantities);
        END IF;
    END IF;
    SELECT array_agg(k.order_id::text), array_agg(k.partition), array_agg(k."offset")
    INTO kept_ids, kept_partitions, kept_offsets FROM kept_commands k WHERE k.order_id = ANY (order_ids);
END $$;
