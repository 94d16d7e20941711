// An open loop of orders by POST, for k6: so many a second whatever the answers take, each read back by some.
//
//   k6 run bench/k6/orders.js -e URL=http://127.0.0.1:8080 -e RATE=1000 -e SECONDS=60
//
// Products 1 to 5, as `orderstream init` loads them; give them stock first, or most orders are refused, which is right too.
// It fails when anything is answered 5xx, or when p95 is a second or more.

import { check } from 'k6';
import http from 'k6/http';
import { Counter } from 'k6/metrics';

const url = __ENV.URL || 'http://127.0.0.1:8080';
const rate = Number(__ENV.RATE || 1000);
const seconds = Number(__ENV.SECONDS || 60);
const READ_BACK = 0.05; // share of the orders that are read again

const reserved = new Counter('orders_reserved');
const refused = new Counter('orders_refused');
const late = new Counter('orders_late');
const failed = new Counter('answers_5xx');

export const options = {
  scenarios: {
    orders: {
      executor: 'constant-arrival-rate',
      rate: rate,
      timeUnit: '1s',
      duration: `${seconds}s`,
      preAllocatedVUs: Math.min(200, rate),
      maxVUs: 4 * rate,
    },
  },
  thresholds: {
    answers_5xx: ['count==0'],
    dropped_iterations: ['count==0'],
    'http_req_duration{name:place}': ['p(95)<1000'],
  },
  summaryTrendStats: ['min', 'med', 'p(95)', 'p(99)', 'max'],
};

http.setResponseCallback(http.expectedStatuses(200, 201, 202, 404, 409));

function items() {
  const first = Math.floor(Math.random() * 5);
  const lines = 1 + Math.floor(Math.random() * 3);
  return Array.from({ length: lines }, (_, n) => ({ product_id: 1 + ((first + n) % 5), quantity: 1 }));
}

export default function () {
  const order = { user_id: 1 + Math.floor(Math.random() * 100000), items: items(), payment_method: 'mock' };
  const headers = { 'Content-Type': 'application/json' };
  const placed = http.post(`${url}/api/v1/orders`, JSON.stringify(order), { headers: headers, tags: { name: 'place' } });
  check(placed, { 'an order is reserved, refused or on its way': (answer) => [201, 202, 409].includes(answer.status) });
  failed.add(placed.status >= 500 ? 1 : 0);
  ({ 201: reserved, 202: late, 409: refused })[placed.status]?.add(1);
  if (placed.status === 201 && Math.random() < READ_BACK) {
    const read = http.get(`${url}${placed.headers.Location}`, { tags: { name: 'read' } });
    check(read, { 'it can be read': (answer) => answer.status === 200 });
    failed.add(read.status >= 500 ? 1 : 0);
  }
}
