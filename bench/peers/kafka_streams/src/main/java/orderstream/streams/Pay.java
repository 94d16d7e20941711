package orderstream.streams;

import java.time.Instant;
import org.apache.kafka.streams.processor.api.Record;

/** Reads held sales; charges them at a provider that always says yes, at once; writes to commit; publishes. */
final class Pay extends Stage<Sale> {
    @Override
    public void process(Record<String, Sale> record) {
        Sale sale = record.value();
        sale.paid("sim-" + sale.order.orderId(), Instant.now());
        publish(Event.paid(sale), record.timestamp());
        context.forward(record, Shop.COMMIT);
    }
}
