-- The catalogue: names, prices and limits of products.  No unit is moved.

-- Load products with their first stock, before any worker has claimed a lane.  Those that are there already stay as they are.
-- Answers how many were new.
CREATE FUNCTION load_catalogue(ids text[], owners int[], names text[], prices bigint[], quantities bigint[]) RETURNS bigint
LANGUAGE sql AS $$
    WITH fresh AS (
        INSERT INTO stock (product_id, partition, name, price_cents, on_hand, initial)
        SELECT t.id, t.owner, t.name, t.price, t.quantity, t.quantity
        FROM unnest(ids, owners, names, prices, quantities) t (id, owner, name, price, quantity) ORDER BY t.id
        ON CONFLICT DO NOTHING RETURNING product_id, partition, initial
    ), entries AS (
        INSERT INTO ledger (partition, lane, sequence, product_id, movement, quantity, command_id, at)
        SELECT f.partition, 'settle', 0, f.product_id, 'initial', f.initial, gen_random_uuid(), now() FROM fresh f
    )
    SELECT count(*) FROM fresh
$$;


-- Create a product without units, or change one (null: as it is), in a step of its owner.  Orders held before keep their price.
-- Answers whether it is new; null: it is not there, and name or price are missing.
CREATE FUNCTION put_product(id text, owner int, new_name text, new_price bigint) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF new_name IS NOT NULL AND new_price IS NOT NULL
       AND load_catalogue(ARRAY[id], ARRAY[owner], ARRAY[new_name], ARRAY[new_price], ARRAY[0::bigint]) = 1 THEN
        RETURN true;
    END IF;
    UPDATE stock s SET sold_before = s.sold, revenue_before = p.revenue_cents
    FROM product_sales p WHERE s.product_id = id AND p.product_id = id AND new_price <> s.price_cents;
    UPDATE stock s SET name = coalesce(new_name, s.name), price_cents = coalesce(new_price, s.price_cents)
    WHERE s.product_id = id;
    RETURN CASE WHEN FOUND THEN false END;
END $$;


-- Retire a product, or take that back, in a step of its owner.  What Redis knows of the product is invalidated.
CREATE FUNCTION retire(retired_id text, is_retired boolean) RETURNS void LANGUAGE sql AS $$
    UPDATE stock s SET retired = is_retired, generation = s.generation + 1
    WHERE s.product_id = retired_id AND s.retired <> is_retired
$$;


-- Count anew who has how many units of a limited product; forget it of a product without a limit.
-- The caller holds the product's row lock.  Finds the orders by the product's ledger: for a new limit and for a repair.
CREATE FUNCTION recount_users(counted_id text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM user_units u WHERE u.product_id = counted_id;
    INSERT INTO user_units (product_id, user_id, units)
    WITH held AS MATERIALIZED (
        SELECT DISTINCT unnest(g.order_ids) AS order_id FROM ledger g WHERE g.product_id = counted_id AND g.movement = 'hold'
    )
    SELECT counted_id, x.user_id, sum(x.quantity)
    FROM (SELECT o.user_id, l.quantity FROM held JOIN orders o USING (order_id) CROSS JOIN LATERAL
               unnest(o.product_ids, o.quantities, o.states, o.owners) l (product_id, quantity, state, owner)
          WHERE l.product_id = counted_id AND l.state IN ('h', 'c') AND coalesce(l.owner, o.home) = o.home
          UNION ALL SELECT h.user_id, h.quantity FROM held JOIN holds h USING (order_id)
          WHERE h.product_id = counted_id AND h.state IN ('h', 'c')) x
    WHERE EXISTS (SELECT FROM stock s WHERE s.product_id = counted_id AND s.limit_per_user IS NOT NULL)
    GROUP BY x.user_id;
END $$;


-- Set a product's limit, null for none, in a step of its owner.  Users who have more already keep it, and get no more.
-- What Redis knows of the product is invalidated.  Answers whether there is such a product.
CREATE FUNCTION set_limit(limited_id text, new_limit bigint) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    old_limit bigint;
BEGIN
    SELECT s.limit_per_user INTO old_limit FROM stock s WHERE s.product_id = limited_id FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF new_limit IS DISTINCT FROM old_limit THEN
        -- clock_timestamp(): whoever was decided under the old limit, before this lock, has an earlier time.
        UPDATE stock s
        SET limit_per_user = new_limit, limited_since = CASE WHEN new_limit IS NOT NULL THEN clock_timestamp() END,
            generation = s.generation + 1
        WHERE s.product_id = limited_id;
        IF (new_limit IS NULL) <> (old_limit IS NULL) THEN
            PERFORM recount_users(limited_id);
        END IF;
    END IF;
    RETURN true;
END $$;


-- Forget users of limited products who have nothing.  Answers how many; of one product at a time, under its lock.
CREATE FUNCTION forget_users(limited_id text) RETURNS int LANGUAGE plpgsql AS $$
DECLARE
    forgotten int;
BEGIN
    PERFORM FROM stock s WHERE s.product_id = limited_id FOR UPDATE;
    DELETE FROM user_units u WHERE u.product_id = limited_id AND u.units = 0;
    GET DIAGNOSTICS forgotten = ROW_COUNT;
    RETURN forgotten;
END $$;
