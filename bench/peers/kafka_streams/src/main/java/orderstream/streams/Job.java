package orderstream.streams;

/** Where the peer works, as the bench says it. */
record Job(
        String kafka,
        String jdbcUrl,
        String table,
        String applicationId,
        String stateDir,
        String guarantee,
        int threads,
        int partitions,
        String orders,
        String deliveries,
        String events) {}
