package orderstream.streams;

import com.fasterxml.jackson.annotation.JsonIgnore;
import com.fasterxml.jackson.annotation.JsonInclude;
import com.fasterxml.jackson.annotation.JsonProperty;
import com.fasterxml.jackson.annotation.JsonPropertyOrder;
import java.time.Instant;
import java.util.List;
import java.util.UUID;

/** What became of an order, with the members that the pipeline's events have; it goes to the order's own partition. */
@JsonInclude(JsonInclude.Include.NON_NULL)
@JsonPropertyOrder({"v", "order_id", "status", "at"})
record Event(
        int v,
        UUID orderId,
        String status,
        String at,
        String userId,
        List<Order.Line> items,
        Long totalCents,
        @JsonProperty("charge_id") String chargeId,
        String reason,
        @JsonIgnore int home) {

    private static final int VERSION = 1;

    static Event created(Sale sale) {
        Order order = sale.order;
        return new Event(
                VERSION, order.orderId(), "CREATED", sale.createdAt.toString(), order.userId(), order.items(),
                null, null, null, sale.partition);
    }

    static Event reserved(Sale sale) {
        return of(sale, "RESERVED", sale.reservedAt, sale.totalCents, null, null);
    }

    static Event paid(Sale sale) {
        return of(sale, "PAID", sale.paidAt, sale.totalCents, sale.chargeId, null);
    }

    static Event confirmed(Sale sale) {
        return of(sale, "CONFIRMED", sale.confirmedAt, null, null, null);
    }

    static Event cancelled(Sale sale) {
        return of(sale, "CANCELLED", sale.cancelledAt, null, null, sale.reason);
    }

    private static Event of(Sale sale, String status, Instant at, Long total, String charge, String reason) {
        return new Event(
                VERSION, sale.order.orderId(), status, at.toString(), null, null, total, charge, reason,
                sale.partition);
    }
}
