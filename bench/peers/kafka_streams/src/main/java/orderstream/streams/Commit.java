package orderstream.streams;

import java.time.Instant;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.state.KeyValueStore;

/** Reads paid sales; sells what is held; writes to the rows; publishes. */
final class Commit extends Stage<Sale> {
    private KeyValueStore<String, Stock> stock;

    @Override
    public void init(ProcessorContext<Object, Object> given) {
        super.init(given);
        stock = stock();
    }

    @Override
    public void process(Record<String, Sale> record) {
        Sale sale = record.value();
        stock.put(record.key(), stock.get(record.key()).sell(sale.line().quantity()));
        sale.confirmed(Instant.now());
        publish(Event.confirmed(sale), record.timestamp());
        context.forward(record, Shop.ROWS);
    }
}
