-- The fence around every transaction of a worker.

-- Take the lanes of these partitions over: from now on no other worker writes for them.  Missing ones are made.
CREATE FUNCTION claim_lanes(wanted int[])
RETURNS TABLE (partition int, lane lane, claim bigint, sequence bigint) LANGUAGE sql AS $$
    INSERT INTO lanes AS l (partition, lane, claim)
    SELECT p.partition, k.lane, 1
    FROM unnest(wanted) p (partition) CROSS JOIN unnest(enum_range(NULL::lane)) k (lane)
    ORDER BY p.partition, k.lane
    ON CONFLICT ON CONSTRAINT lanes_once DO UPDATE SET claim = l.claim + 1
    RETURNING l.partition, l.lane, l.claim, l.sequence
$$;


-- Begin a transaction for these partitions: the first statement of each stage function, with the planner as these set it.
--   claims, sequences  what this worker believes; the sequence grows by one.
--   attempt            names this try, so that one whose answer was lost is recognised.
--   mark_*             what has been read, one element a topic and partition.
--   rows_of            partitions of what the transaction is to write.
-- Raises OS001 where a lane has another claim or sequence, or a row is of none of these partitions: nothing is written.
CREATE FUNCTION begin_step(
    wanted lane, partitions int[], claims bigint[], sequences bigint[], this_attempt uuid,
    mark_partitions int[], mark_topics text[], mark_nexts bigint[], mark_acknowledged bigint[], mark_stamps bigint[],
    mark_digests bigint[], rows_of int[]
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    moved int;
BEGIN
    PERFORM FROM lanes l WHERE l.partition = ANY (partitions) AND l.lane = wanted ORDER BY l.partition FOR UPDATE;
    UPDATE lanes l SET sequence = l.sequence + 1, attempt = this_attempt, at = now()
    FROM unnest(partitions, claims, sequences) t (partition, claim, sequence)
    WHERE l.partition = t.partition AND l.lane = wanted AND l.claim = t.claim AND l.sequence = t.sequence;
    GET DIAGNOSTICS moved = ROW_COUNT;
    IF moved <> cardinality(partitions) THEN
        RAISE EXCEPTION 'another worker has claimed one of these lanes, or Postgres was set back' USING ERRCODE = 'OS001';
    END IF;
    IF EXISTS (SELECT FROM unnest(rows_of || mark_partitions) r (partition) WHERE r.partition <> ALL (partitions)) THEN
        RAISE EXCEPTION 'a row is of a partition that this transaction is not for' USING ERRCODE = 'OS001';
    END IF;
    IF cardinality(mark_partitions) > 0 THEN
        INSERT INTO marks AS m (partition, topic, next_offset, acknowledged, stamp, digest)
        SELECT * FROM unnest(mark_partitions, mark_topics, mark_nexts, mark_acknowledged, mark_stamps, mark_digests)
        ON CONFLICT ON CONSTRAINT marks_once DO UPDATE
        SET next_offset = greatest(m.next_offset, excluded.next_offset),
            acknowledged = greatest(m.acknowledged, excluded.acknowledged),
            -- a digest of -1: what was passed over had no records, so the last one is the one that was
            stamp = CASE WHEN m.next_offset < excluded.next_offset AND excluded.digest <> -1
                    THEN excluded.stamp ELSE m.stamp END,
            digest = CASE WHEN m.next_offset < excluded.next_offset AND excluded.digest <> -1
                     THEN excluded.digest ELSE m.digest END
        WHERE m.next_offset < excluded.next_offset OR m.acknowledged < excluded.acknowledged;
    END IF;
END $$;
