-- The counts of stock, and the ledger of what moved them.  Called by the stage functions, with the planner as these set it.

-- Count what moved for orders, and write it to the ledger: one row a product and movement.
--   wanted, partitions  the lanes whose step this is; the ledger names them with their sequences.
--   each                movement (one element: that of all), order, product, units.
-- Raises 23514 (a CHECK) where a count would become negative or more would be reserved than there is, OS004 where there is no
-- such product, OS005 where it is of another partition.
CREATE FUNCTION move_stock(
    wanted lane, partitions int[], movements movement[], order_ids uuid[], moved_ids text[], quantities int[],
    OUT product_ids text[], OUT on_hands bigint[], OUT reserveds bigint[], OUT versions bigint[], OUT generations bigint[],
    OUT solds bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    expected int;
    owes     boolean;
    every    movement := movements[1];
BEGIN
    PERFORM FROM stock s
    WHERE s.product_id = ANY (ARRAY(SELECT DISTINCT unnest(moved_ids))) AND s.partition = ANY (partitions)
    ORDER BY s.product_id FOR UPDATE;
    WITH moved AS (
        SELECT t.product_id, coalesce(t.movement, every) AS movement, sum(t.quantity) AS quantity,
               array_agg(t.order_id) AS order_ids, array_agg(t.quantity) AS quantities
        FROM unnest(movements, order_ids, moved_ids, quantities) t (movement, order_id, product_id, quantity)
        GROUP BY 1, 2
    ), change AS (
        SELECT m.product_id,
               sum(CASE m.movement WHEN 'hold' THEN m.quantity ELSE 0 END)::bigint AS held,
               sum(CASE m.movement WHEN 'commit' THEN m.quantity ELSE 0 END)::bigint AS committed,
               sum(CASE m.movement WHEN 'release' THEN m.quantity ELSE 0 END)::bigint AS released,
               sum(CASE m.movement WHEN 'return' THEN m.quantity ELSE 0 END)::bigint AS returned
        FROM moved m GROUP BY m.product_id
    ), counted AS (
        UPDATE stock s
        SET reserved = s.reserved + c.held - c.committed - c.released,
            on_hand = s.on_hand - c.committed + c.returned,
            sold = s.sold + c.committed - c.returned,
            version = s.version + 1
        FROM change c WHERE s.product_id = c.product_id AND s.partition = ANY (partitions)
        RETURNING s.product_id, s.on_hand, s.reserved, s.version, s.generation, s.sold, s.owed
    ), noted AS (
        INSERT INTO ledger (partition, lane, sequence, product_id, movement, quantity, order_ids, quantities, at)
        SELECT n.partition, wanted, l.sequence, m.product_id, m.movement, m.quantity, m.order_ids, m.quantities, now()
        FROM moved m JOIN stock n ON n.product_id = m.product_id AND n.partition = ANY (partitions)
        JOIN lanes l ON l.partition = n.partition AND l.lane = wanted
        RETURNING 1
    )
    SELECT array_agg(n.product_id), array_agg(n.on_hand), array_agg(n.reserved), array_agg(n.version),
           array_agg(n.generation), array_agg(n.sold), (SELECT count(*) FROM moved) - (SELECT count(*) FROM noted),
           bool_or(n.owed > 0)
    INTO product_ids, on_hands, reserveds, versions, generations, solds, expected, owes
    FROM counted n;
    IF expected <> 0 THEN
        IF EXISTS (SELECT FROM stock s WHERE s.product_id = ANY (moved_ids) AND s.partition <> ALL (partitions)) THEN
            RAISE EXCEPTION 'units of a product of another partition' USING ERRCODE = 'OS005';
        END IF;
        RAISE EXCEPTION 'units of a product that does not exist' USING ERRCODE = 'OS004';
    END IF;
    IF owes THEN
        PERFORM put_against_owed(wanted, product_ids);
        SELECT array_agg(s.product_id), array_agg(s.on_hand), array_agg(s.reserved), array_agg(s.version),
               array_agg(s.generation), array_agg(s.sold)
        INTO product_ids, on_hands, reserveds, versions, generations, solds
        FROM stock s WHERE s.product_id = ANY (product_ids);
    END IF;
END $$;


-- Put the available units of these products, whose rows the caller has locked, against those that were sold beyond what there
-- was: nobody else gets them.
CREATE FUNCTION put_against_owed(wanted lane, ids text[]) RETURNS void LANGUAGE sql AS $$
    WITH put AS (
        UPDATE stock s
        SET on_hand = s.on_hand - u.units, adjusted = s.adjusted - u.units, owed = s.owed - u.units, version = s.version + 1
        FROM (SELECT b.product_id, least(b.owed, b.on_hand - b.reserved) AS units FROM stock b
              WHERE b.product_id = ANY (ids) AND b.owed > 0) u
        WHERE s.product_id = u.product_id AND u.units > 0
        RETURNING s.partition, s.product_id, u.units
    )
    INSERT INTO ledger (partition, lane, sequence, product_id, movement, quantity, command_id, reason, at)
    SELECT p.partition, wanted, l.sequence, p.product_id, 'adjust', -p.units, gen_random_uuid(),
           'against what was sold before Postgres was set back', now()
    FROM put p JOIN lanes l ON l.partition = p.partition AND l.lane = wanted
$$;


-- The counts of products, their rows locked until the transaction ends, with the claims of their partitions.
CREATE FUNCTION lock_stock(wanted text[])
RETURNS TABLE (
    product_id text, on_hand bigint, reserved bigint, version bigint, generation bigint, limit_per_user bigint, retired boolean,
    claim bigint
)
LANGUAGE sql AS $$
    SELECT s.product_id, s.on_hand, s.reserved, s.version, s.generation, s.limit_per_user, s.retired,
        coalesce((SELECT l.claim FROM lanes l WHERE l.partition = s.partition AND l.lane = 'intake'), 0)
    FROM stock s WHERE s.product_id = ANY (wanted) ORDER BY s.product_id FOR UPDATE
$$;


-- Add to what users have of products with a limit; those of other products are left out.
-- Called with the products' rows locked.  Answers what they have now.
-- Raises OS002 where one of them would have more than the limit.
CREATE FUNCTION count_users(
    counted_ids text[], counted_users text[], changes int[],
    OUT limited_ids text[], OUT limited_users text[], OUT limited_units bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    over boolean;
BEGIN
    WITH change AS (
        SELECT s.product_id, t.user_id, sum(t.units) AS units
        FROM unnest(counted_ids, counted_users, changes) t (product_id, user_id, units)
        JOIN stock s ON s.product_id = t.product_id AND s.limit_per_user IS NOT NULL
        GROUP BY s.product_id, t.user_id
    ), more AS (
        INSERT INTO user_units AS u (product_id, user_id, units)
        SELECT c.product_id, c.user_id, c.units FROM change c WHERE c.units > 0 ORDER BY c.product_id, c.user_id
        ON CONFLICT ON CONSTRAINT user_units_once DO UPDATE SET units = u.units + excluded.units
        RETURNING u.product_id, u.user_id, u.units
    ), fewer AS (  -- not by the INSERT: the CHECK would see the row that it proposes
        UPDATE user_units u SET units = u.units + c.units
        FROM change c WHERE c.units < 0 AND u.product_id = c.product_id AND u.user_id = c.user_id
        RETURNING u.product_id, u.user_id, u.units
    ), counted AS (
        SELECT m.*, m.units > s.limit_per_user AS is_over FROM more m JOIN stock s ON s.product_id = m.product_id
        UNION ALL SELECT f.*, false FROM fewer f
    )
    SELECT array_agg(n.product_id), array_agg(n.user_id), array_agg(n.units), bool_or(n.is_over)
    INTO limited_ids, limited_users, limited_units, over
    FROM counted n;
    IF over THEN
        RAISE EXCEPTION 'a user would have more of a product than one may' USING ERRCODE = 'OS002';
    END IF;
END $$;
