package orderstream.streams;

import com.fasterxml.jackson.databind.JsonNode;
import java.io.BufferedReader;
import java.io.EOFException;
import java.io.FileDescriptor;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.time.Instant;
import java.util.Map;
import java.util.Optional;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.LinkedBlockingQueue;

/**
 * The process that the bench drives: a line of JSON in, a line of JSON out. The first line is the {@link Job}; each
 * other one has a member {@code do}:
 *
 * <ul>
 *   <li>{@code start}, {@code commit_interval_ms}: run the application; answered when it owns its partitions.
 *   <li>{@code expect}, {@code orders}: so many more will come.
 *   <li>{@code sell}: answered when they are stored and their events published, with the time of the end, in seconds
 *       since 1970.
 *   <li>{@code counts}: the sums over the store of stock.
 *   <li>{@code stop}: end the application.
 * </ul>
 */
final class Main {
    private Main() {}

    static double now() {
        Instant at = Instant.now();
        return at.getEpochSecond() + at.getNano() / 1e9;
    }

    public static void main(String[] args) throws Exception {
        PrintStream out = new PrintStream(new FileOutputStream(FileDescriptor.out), true, StandardCharsets.UTF_8);
        System.setOut(System.err); // whatever a library prints goes to the log
        try {
            serve(out);
            System.exit(0);
        } catch (Exception | Error e) {
            e.printStackTrace();
            Runtime.getRuntime().halt(1);
        }
    }

    /** Reads commands until their end; a sale that goes on then has no bench any more, and fails. */
    private static void read(BlockingQueue<Optional<String>> lines, Failure failure) {
        try (BufferedReader in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8))) {
            for (String line = in.readLine(); line != null; line = in.readLine()) {
                lines.add(Optional.of(line));
            }
            failure.set(new EOFException("the bench has ended"));
        } catch (IOException e) {
            failure.set(e);
        } finally {
            lines.add(Optional.empty());
        }
    }

    private static void serve(PrintStream out) throws Exception {
        Failure failure = new Failure();
        BlockingQueue<Optional<String>> lines = new LinkedBlockingQueue<>();
        Thread reader = new Thread(() -> read(lines, failure), "commands");
        reader.setDaemon(true);
        reader.start();
        Job job = Json.MAPPER.readValue(lines.take().orElseThrow(), Job.class);
        Store store = new Store(job);
        Shop shop = null;
        long target = 0;
        for (Optional<String> line = lines.take(); line.isPresent(); line = lines.take()) {
            JsonNode command = Json.MAPPER.readTree(line.get());
            Map<String, ?> answer = Map.of();
            switch (command.get("do").asText()) {
                case "start" -> {
                    shop = new Shop(job, command.get("commit_interval_ms").asLong(), store, failure);
                    failure.check();
                }
                case "expect" -> target = store.done() + command.get("orders").asLong();
                case "sell" -> answer = Map.of("end", store.await(target, failure));
                case "counts" -> {
                    long[] sums = shop.counts();
                    answer = Map.of("on_hand", sums[0], "reserved", sums[1], "sold", sums[2]);
                }
                case "stop" -> {
                    shop.close();
                    store.close();
                    shop = null;
                }
                default -> throw new IllegalArgumentException(line.get());
            }
            out.println(Json.MAPPER.writeValueAsString(answer));
        }
        if (shop != null) {
            shop.close();
        }
    }
}
