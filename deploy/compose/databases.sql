-- A role and a database for each service, which cannot see the other's. Run once, by psql, in an empty PostgreSQL.
\set ON_ERROR_STOP on
\set cognate `cat /run/secrets/cognate_database_password`
\set agent `cat /run/secrets/agent_database_password`
CREATE ROLE cognate LOGIN PASSWORD :'cognate';
CREATE ROLE agent LOGIN PASSWORD :'agent';
CREATE DATABASE cognate OWNER cognate;
CREATE DATABASE agent OWNER agent;
REVOKE CONNECT ON DATABASE cognate FROM PUBLIC;
REVOKE CONNECT ON DATABASE agent FROM PUBLIC;
