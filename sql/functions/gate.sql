-- The gate: which Redis a pipeline has.

-- What makes up an epoch of the gate beside the Redis that is there.  Where `notes`, it is noted which that is: as often as it is
-- another one than before, what any of them knows is invalid, also of one that comes back.
CREATE FUNCTION enter_gate(redis_now text, notes boolean) RETURNS TABLE (pipeline text, gates int, postgres text)
LANGUAGE plpgsql AS $$
BEGIN
    IF notes THEN
        UPDATE pipeline p SET redis = redis_now, gates = p.gates + 1 WHERE p.redis IS DISTINCT FROM redis_now;
    END IF;
    RETURN QUERY
    SELECT p.id::text, p.gates, concat_ws(':', c.system_identifier, d.oid, left(pg_walfile_name(pg_current_wal_lsn()), 8))
    FROM pipeline p, pg_control_system() c, pg_database d WHERE d.datname = current_database();
END $$;
