package orderstream.streams;

import java.time.Instant;

/** An order on its way through the stages of one task; at its end, the row that is stored. */
final class Sale {
    final Order order;
    final int partition;
    final long offset;
    final Instant createdAt;

    String status = "CREATED";
    String reason;
    Long priceCents;
    Long totalCents;
    String chargeId;
    Instant reservedAt;
    Instant paidAt;
    Instant confirmedAt;
    Instant cancelledAt;

    Sale(Order order, int partition, long offset, Instant createdAt) {
        this.order = order;
        this.partition = partition;
        this.offset = offset;
        this.createdAt = createdAt;
    }

    Order.Line line() {
        return order.items().get(0);
    }

    void reserved(long price, Instant at) {
        status = "RESERVED";
        priceCents = price;
        totalCents = price * line().quantity();
        reservedAt = at;
    }

    void paid(String charge, Instant at) {
        status = "PAID";
        chargeId = charge;
        paidAt = at;
    }

    void confirmed(Instant at) {
        status = "CONFIRMED";
        confirmedAt = at;
    }

    void cancelled(String why, Instant at) {
        status = "CANCELLED";
        reason = why;
        cancelledAt = at;
    }
}
