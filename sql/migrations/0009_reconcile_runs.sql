-- What each run of `orderstream reconcile` found. Workers and ingresses tell Prometheus of the last one: the command itself
-- has ended before anybody could scrape it.

CREATE TABLE reconcile_runs (
    at             timestamptz      NOT NULL DEFAULT now() CONSTRAINT reconcile_runs_once PRIMARY KEY,
    resumed        boolean          NOT NULL,       -- it went on from a checkpoint
    records        bigint           NOT NULL,       -- read, in so many seconds
    seconds        double precision NOT NULL,
    orders         bigint           NOT NULL,       -- compared
    products       bigint           NOT NULL,
    open_orders    bigint           NOT NULL,
    drift          jsonb            NOT NULL,       -- kind of difference to how many were found; kinds without one left out
    unrepaired     jsonb            NOT NULL        -- the same of those that stand after --repair --yes
);
