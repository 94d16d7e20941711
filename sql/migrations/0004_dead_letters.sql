-- What was done about dead letters. The letters stay on their topic as they are; one that has no row here is open.

CREATE TYPE letter_action AS ENUM ('retry', 'drop');

-- One narrow row a letter that somebody dealt with. A retry is noted before its record is produced and done_at after: a row
-- without done_at is a retry under way, or one that a crash left, which running it again completes.
CREATE TABLE letter_actions (
    letter_partition int           NOT NULL,       -- where on the topic `dead-letters` the letter stands
    letter_offset    bigint        NOT NULL,
    letter_at        timestamptz   NOT NULL,       -- when it was written: offsets of a topic made anew count from 0 again
    action           letter_action NOT NULL,
    why              text,                         -- of a drop: as the operator said it
    value            bytea,                        -- of a retry: what was sent instead of the letter's own bytes
    begun_at         timestamptz   NOT NULL DEFAULT now(),
    done_at          timestamptz,
    CONSTRAINT letter_actions_once     PRIMARY KEY (letter_partition, letter_offset, letter_at),
    CONSTRAINT letter_actions_drop_why CHECK ((action = 'drop') = (why IS NOT NULL)),
    CONSTRAINT letter_actions_drop     CHECK (action = 'retry' OR (done_at IS NOT NULL AND value IS NULL))
);
