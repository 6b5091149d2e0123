"""Gated models: conversion, saving, loading, and the op behind transformers' attention interface."""
