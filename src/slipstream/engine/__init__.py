"""The engine: `runner` turns a Step into tokens, `engine` ties requests, scheduler and runner together."""
